"""Adding a part: what CONTRIBUTING.md names is all that a new one needs, and it appears everywhere.

The parts are added from outside the package, as a contributor would add them inside it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal, get_args

import pytest
import torch
import yaml

from pretrain_cli.config import build, reference
from pretrain_cli.config.run_config import RunConfig, SpeedConfig
from pretrain_cli.config.setting_types import Auto, SpeedSetting
from pretrain_cli.engine.benchmark.arms import ablation, parse_backends
from pretrain_cli.engine.benchmark.workload import Workload
from pretrain_cli.engine.planning import memory_estimate, plan
from pretrain_cli.engine.planning.memory_estimate import ATTENTION, AttentionMemory
from pretrain_cli.engine.runtime.speed import RULES, Rule, resolve_speed
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.attention_backends import BACKENDS, best_backend
from pretrain_cli.model.presets import preset

CPU = torch.device("cpu")


class MoreSpeed(SpeedConfig):
    attention: Annotated[
        Literal["auto", "eager", "sdpa", "flex", "blocks", "plain"],
        SpeedSetting(decides_micro_batch=True, is_announced=True, on_any_gpu="sdpa"),
    ] = "auto"
    """Attention backend."""
    louder: Annotated[
        bool | Auto,
        SpeedSetting(is_process_wide=True, decides_micro_batch=True, is_announced=True),
    ] = "auto"
    """Turn the fans up before the first step. auto: on a CPU."""


class MoreConfig(RunConfig):
    speed: MoreSpeed = MoreSpeed()


def decide_louder(asked, here):
    if here.device.type != "cpu":
        return False, "this device has no fans of its own"
    return (True, "the room is cold") if asked == "auto" else (asked, "")


@pytest.fixture
def applied(monkeypatch):
    """Add the setting `louder` and the backend `plain`; return the values of `louder` that were
    applied to the process."""
    for module in (build, reference, plan):
        monkeypatch.setattr(module, "RunConfig", MoreConfig)
    values = []
    monkeypatch.setitem(RULES, "louder", Rule(decide_louder, values.append))
    backend = dataclasses.replace(BACKENDS["eager"], best_on={"meta": "nothing is computed"})
    monkeypatch.setitem(BACKENDS, "plain", backend)
    monkeypatch.setitem(ATTENTION, "plain", AttentionMemory(lambda t, window: 1000.0))
    return values


@pytest.fixture
def workload():
    model = preset("gemma3-tiny")
    return Workload(name="gemma3-tiny", model=model, seq_len=64, micro_batch_size=2, device="cpu")


def test_a_new_speed_setting_is_in_the_manual_and_checked(applied):
    assert "| `louder` | `true`, `false` or `auto` | `auto` | Turn the fans up" in (
        reference.settings_tables()
    )
    with pytest.raises(ConfigError, match=r"speed\.louder: 7 is not true or false or auto"):
        build.build_config({}, {"speed.louder": 7}, [])


def test_a_new_speed_setting_is_applied_announced_and_recorded(applied, pretrain, corpus, tiny):
    assert pretrain(f"tokenize --tokenizer bytes {corpus}").code == 0
    done = pretrain(f"train {tiny} --steps 2 --out run")
    assert done.code == 0
    assert "louder True (the room is cold)" in done.out
    assert applied == [True]
    record = yaml.safe_load(Path("run/run.yaml").read_text())
    assert record["settings"]["speed"]["louder"] == "auto"
    assert record["speed"]["louder"] == {
        "asked": "auto", "in_force": True, "reason": "the room is cold",
    }  # fmt: skip
    assert pretrain("train --resume run --steps 3 --set speed.louder=false").code == 0
    assert applied == [True, False]


def test_a_new_speed_setting_has_arms_in_an_ablation(applied, workload):
    arms = {arm.name: arm for arm in ablation(workload, MoreSpeed())}
    assert arms["+ louder"].speed.louder is True
    assert arms["− louder"].speed.louder is False
    assert "louder" in MoreSpeed.names("decides_micro_batch")
    assert "louder" in MoreSpeed.names("is_process_wide")


def test_a_new_backend_trains_as_the_one_it_copies(applied, pretrain, corpus, tiny):
    assert pretrain(f"tokenize --tokenizer bytes {corpus}").code == 0
    for name in ("plain", "eager"):
        assert pretrain(f"train {tiny} --steps 2 --attn {name} --out {name}").code == 0
    record = yaml.safe_load(Path("plain/run.yaml").read_text())
    assert record["speed"]["attention"]["in_force"] == "plain"
    losses = []
    for name in ("plain", "eager"):
        lines = map(json.loads, Path(f"{name}/metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line["kind"] == "step"])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_a_new_backend_is_benchmarked_estimated_and_chosen(applied, workload):
    assert "plain" in parse_backends("all")
    assert any(arm.name == "+ attention plain" for arm in ablation(workload, MoreSpeed()))
    assert best_backend(torch.device("meta")) == ("plain", "nothing is computed")
    speed = resolve_speed(MoreSpeed(attention="plain", compile=False), CPU)
    step = memory_estimate.StepShape(
        model=workload.model,
        seq_len=64,
        micro_batch_size=2,
        device="cpu",
        **memory_estimate.speed_settings(speed),
    )
    eager = dataclasses.replace(step, attention="eager")
    estimates = [memory_estimate.estimate(shape).parts["activations"] for shape in (step, eager)]
    assert estimates[0] != estimates[1]


def test_every_list_of_backends_has_the_same_names():
    named = set(get_args(SpeedConfig.model_fields["attention"].annotation)) - {"auto"}
    assert named == set(BACKENDS) == set(ATTENTION)


def test_auto_of_every_speed_setting_is_resolved():
    speed = resolve_speed(SpeedConfig(), CPU)
    assert set(speed.decisions) == set(SpeedConfig.model_fields)
    assert not [d.setting for d in speed.decisions.values() if d.in_force == "auto"]
    assert set(RULES) <= set(SpeedConfig.model_fields)
