"""TensorBoard and Weights & Biases: the numbers of metrics.jsonl, no step twice."""

import errno
import importlib.util
import json
import shutil
import struct

import pytest

from pretrain_cli.config.build import build_config
from pretrain_cli.engine.runs import trackers
from pretrain_cli.engine.runs.events import Notice
from pretrain_cli.engine.runs.run_yaml import read_record, resumed_settings
from pretrain_cli.engine.training import run_log
from pretrain_cli.errors import ConfigError

needs = {
    name: pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"the package {name} is not installed"
    )
    for name in ("tensorboard", "wandb")
}


def resume(run, folder):
    record = read_record(folder)
    settings = resumed_settings(record, build_config(record.settings, {}, []))
    return run(settings, resume=(folder, record))


def losses(folder, kind="step"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == kind]


def killed_after_its_last_step(run, settings, folder):
    """Make a run as a kill after step 6 leaves it: all lines written, newest checkpoint step 3."""
    run(settings)
    shutil.rmtree(folder / "checkpoints/step-000006")


@needs["tensorboard"]
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_each_step_once_with_its_numbers(settings, run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(train__log="tensorboard", train__checkpoint_every=3, train__eval_every=2)
    killed_after_its_last_step(run, config, tmp_path / "run")
    resume(run, tmp_path / "run")
    shown = EventAccumulator(str(tmp_path / "run/tensorboard"))
    shown.Reload()
    for tag, kind in (("train/loss", "step"), ("validation/loss", "evaluation")):
        scalars = [(event.step, event.value) for event in shown.Scalars(tag)]
        assert [step for step, _ in scalars] == [step for step, _ in losses(tmp_path / "run", kind)]
        assert [value for _, value in scalars] == pytest.approx(
            [loss for _, loss in losses(tmp_path / "run", kind)], rel=1e-6
        )
    assert {"train/mfu", "train/gradient_norm", "validation/bits_per_byte"} <= set(
        shown.Tags()["scalars"]
    )
    assert "sample/no prompt/text_summary" in shown.Tags()["tensors"]


def kept_records(file):
    """Yield the records of an offline W&B file: seven bytes, then a LevelDB log of 32 KiB blocks.

    A record is stored in one or more parts, each with a header of seven bytes: checksum, length
    and kind (1 whole, 2 first, 3 middle, 4 last).
    """
    place, record = 7, b""
    while place + 7 <= len(file):
        if 2**15 - place % 2**15 < 7:  # no room for a header: skip to the next block
            place += 2**15 - place % 2**15
            continue
        length, kind = struct.unpack("<HB", file[place + 4 : place + 7])
        record += file[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@needs["wandb"]
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_offline_has_one_run_and_each_step_once(settings, run, tmp_path, monkeypatch):
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = settings(train__log="wandb", train__checkpoint_every=3, train__eval_every=2)
    killed_after_its_last_step(run, config, tmp_path / "run")
    resume(run, tmp_path / "run")  # repeats steps 4 to 6
    record = read_record(tmp_path / "run")
    more = build_config(record.settings, {"train.steps": 8}, [])
    run(resumed_settings(record, more), resume=(tmp_path / "run", record))

    ids, sent = set(), []
    for path in sorted(tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")):
        for data in kept_records(path.read_bytes()):
            entry = wandb_internal_pb2.Record()
            entry.ParseFromString(data)
            if entry.WhichOneof("record_type") == "run":
                ids.add(entry.run.run_id)
            if entry.WhichOneof("record_type") == "history":
                items = entry.history.item
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                if "train/loss" in row:
                    sent.append((row["step"], row["train/loss"]))
    assert len(ids) == 1
    assert sent == losses(tmp_path / "run")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_tracker_package_is_refused_before_the_run_starts(
    settings, run, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"'{name}' is .*; pip install 'pretrain\[{name}\]'"):
        run(settings(train__log=name))
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_name_is_refused(settings):
    assert settings(train__log="wandb, tensorboard").train.log == ("wandb", "tensorboard")
    with pytest.raises(ConfigError, match=r"train.log: '' is not one of tensorboard, wandb"):
        settings(train__log="wandb,")
    with pytest.raises(ConfigError, match=r"train.log: 'tensorbord' is not one of tensorboard, wa"):
        settings(train__log="tensorbord")


def test_a_tracker_on_a_full_disk_is_dropped_and_training_continues(settings, run, monkeypatch):
    class Broken:
        given = 0

        def take(self, event):
            Broken.given += 1
            if Broken.given == 3:
                raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            pass

        def close(self):
            raise AssertionError("it is left out")

    monkeypatch.setattr(run_log, "open_trackers", lambda *_, **__: [Broken()])
    events = run(settings())
    told = [event.text for event in events if isinstance(event, Notice)]
    assert sum("Broken: No space left on device" in text for text in told) == 1
    assert Broken.given == 3
    assert events[-1].reason == "done"
