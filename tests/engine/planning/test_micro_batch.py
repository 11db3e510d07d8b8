"""Choice of the micro-batch: the resumed run's, the fastest measured, or the largest that fits."""

import dataclasses
import json

import pytest
import torch
import yaml

from pretrain_cli.config.build import check_config
from pretrain_cli.engine.planning import choices, micro_batch
from pretrain_cli.engine.planning.micro_batch import (
    choose_micro_batch,
    fastest,
    measured,
    recall,
    remember,
)
from pretrain_cli.engine.runs.events import Notice, StepMetrics
from pretrain_cli.engine.runs.run_yaml import read_record, resumed_settings
from pretrain_cli.engine.runtime.distributed import device_name
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.presets import preset


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """Keep measured micro-batches in a temporary folder."""
    monkeypatch.setattr(micro_batch, "MEASURED", tmp_path / "found" / "micro-batches.json")


def bytes_of(size):
    return 100 + 10 * size


@pytest.mark.parametrize(
    ("share", "room", "size"),
    [(8, 1000, 8), (8, 180, 8), (8, 179, 4), (8, 110, 1), (8, 50, 1), (6, 135, 3), (7, 165, 1)],
)
def test_the_estimate_chooses_the_largest_divisor_that_fits(share, room, size):
    assert choose_micro_batch(share, bytes_of, room) == (
        micro_batch.MicroBatch(size, "by the estimate of memory")
    )


def test_measured_rates_take_precedence_over_the_estimate():
    rates = {1: 90.0, 2: 120.0, 3: 150.0, 4: 100.0, 8: 110.0}
    choice = choose_micro_batch(8, bytes_of, 1000, rates=rates)
    assert choice == micro_batch.MicroBatch(2, "the fastest measured here")  # 3 does not divide 8
    assert choose_micro_batch(8, bytes_of, 110, rates=rates).size == 1  # 2 does not fit
    assert choose_micro_batch(8, bytes_of, 1000, rates={3: 150.0}).size == 8


def test_a_resumed_run_keeps_its_micro_batch_regardless_of_memory():
    assert choose_micro_batch(8, bytes_of, 50, had=4, rates={2: 9.0}) == micro_batch.MicroBatch(
        4, "as before"
    )
    assert choose_micro_batch(9, bytes_of, 1000, had=4).size == 9  # 4 does not divide 9


def test_nearly_equal_rates_choose_the_smallest_size():
    assert fastest({1: 50.0, 2: 99.0, 4: 100.0, 8: 100.5}) == 2
    assert fastest({1: 50.0, 2: 97.0, 4: 100.0}) == 4


# --- stored measurements -------------------------------------------------------------------------

SPEED = dict.fromkeys(micro_batch.MICRO_BATCH_KEYS, "x") | {"prefetch": True}


def a_measurement(rates, **changes):
    of = {"machine": "here", "model": preset("gemma3-tiny"), "seq_len": 64, "speed": SPEED}
    return measured(**(of | changes), rates=rates)


def test_a_measurement_applies_to_equal_machine_model_and_settings():
    assert recall(a_measurement({})) == {}
    remember(a_measurement({1: 10.0, 2: 12.0}))
    remember(a_measurement({1: 20.0}, seq_len=128))
    remember(a_measurement({1: 11.0, 4: 15.5}))
    assert recall(a_measurement({})) == {1: 11.0, 4: 15.5}
    assert recall(a_measurement({}, seq_len=128)) == {1: 20.0}
    assert recall(a_measurement({}, machine="there")) == {}
    assert recall(a_measurement({}, model=preset("qwen3-tiny"))) == {}
    assert recall(a_measurement({}, speed=SPEED | {"dtype": "y"})) == {}
    assert recall(a_measurement({}, speed=SPEED | {"prefetch": False})) != {}
    unpadded = dataclasses.replace(preset("gemma3-tiny"), pad_token_id=None)
    assert recall(a_measurement({}, model=unpadded)) != {}
    assert len(json.loads(micro_batch.MEASURED.read_text())) == 2


@pytest.mark.parametrize("text", ["", "[{}]", "{}x", '[{"tokens_per_second": 3}]', "[3]"])
def test_a_damaged_measurement_file_is_refused(text):
    micro_batch.MEASURED.parent.mkdir()
    micro_batch.MEASURED.write_text(text)
    with pytest.raises(ConfigError, match=r"micro-batches\.json: damaged; remove it, and"):
        recall(a_measurement({}))


# --- a run ---------------------------------------------------------------------------------------


def notices(events):
    return [event.text for event in events if isinstance(event, Notice)]


def test_a_run_uses_the_measured_micro_batch_and_keeps_it_on_resume(
    settings, run, tmp_path, monkeypatch
):
    auto = settings(train__micro_batch_size="auto", train__tokens_per_step=256, train__steps=4)
    first = run(settings("other", train__micro_batch_size="auto", train__steps=1))
    assert any("micro-batch 4 (by the estimate of memory)" in text for text in notices(first))
    record = read_record(tmp_path / "other")
    speed = resolve_speed(auto.speed, torch.device("cpu"))
    remember(
        measured(
            device_name(torch.device("cpu")),
            record.model,
            32,
            {name: decision.in_force for name, decision in speed.decisions.items()},
            {1: 10.0, 2: 30.0, 4: 20.0, 8: 20.0},
        )
    )
    events = run(auto)
    assert any("micro-batch 2 (the fastest measured here)" in text for text in notices(events))
    machine = yaml.safe_load((tmp_path / "run/run.yaml").read_text())["machine"]
    assert machine["micro_batch_size"] == 2
    assert machine["micro_batch_is"] == "the fastest measured here"

    monkeypatch.setattr(choices, "memory_here", lambda device: 0)
    micro_batch.MEASURED.unlink()
    record = read_record(tmp_path / "run")
    longer = check_config(record.settings | {"train": record.settings["train"] | {"steps": 5}})
    run(resumed_settings(record, longer), resume=(tmp_path / "run", record))
    machine = yaml.safe_load((tmp_path / "run/run.yaml").read_text())["machine"]
    assert (machine["micro_batch_size"], machine["micro_batch_is"]) == (2, "as before")


def test_losses_for_different_micro_batches_differ_by_rounding_only(settings, run):
    losses = []
    for size in (1, 2, 8):
        events = run(
            settings(f"of-{size}", train__micro_batch_size=size, train__tokens_per_step=256)
        )
        losses.append([event.loss for event in events if isinstance(event, StepMetrics)])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
