"""Profiles: the parts and operators of a step. Without a profiler, spans cost nothing."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark import timing
from pretrain_cli.engine.benchmark.workload import Arm, Repeats, Workload
from pretrain_cli.engine.runs.events import Profiled, StepMetrics
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.presets import preset
from pretrain_cli.spans import span


def test_a_span_is_a_null_context_without_a_profiler():
    assert isinstance(span("forward"), nullcontext)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
        assert not isinstance(span("forward"), nullcontext)
    assert isinstance(span("forward"), nullcontext)


@pytest.mark.parametrize("chunked", [True, False])
def test_parts_of_a_profiled_step_add_up_to_its_seconds(tmp_path, chunked):
    workload = Workload(
        name="x", model=preset("qwen3-tiny"), seq_len=64, micro_batch_size=1, device="cpu"
    )
    speed = SpeedConfig(dtype="float32", compile=False, chunked_loss=chunked)
    arm = Arm(name="x", workload=workload, speed=speed)
    found = timing.profile_arm(
        arm, Repeats(rounds=1, steps=1, warmup=1), str(tmp_path / "deep/trace.json")
    )
    assert found.steps == timing.PROFILED_STEPS
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    for name in ("forward", "loss", "backward", "optimizer"):
        assert 0.01 < found.parts[name] / found.seconds < 0.98, name
    assert found.parts["data"] == 0
    assert found.parts["other"] < 0.1 * found.seconds
    largest = found.operators[0]
    assert largest.seconds > 0
    assert "aten::mm" in [operator.name for operator in found.operators]
    assert not any(operator.name.startswith("pretrain: ") for operator in found.operators)
    named = {
        event.get("name") for event in json.loads(Path(found.trace).read_text())["traceEvents"]
    }
    assert {"pretrain: forward", "pretrain: loss", "pretrain: backward", "aten::mm"} <= named


def test_a_run_profiles_its_steps_after_three_of_warm_up(settings, run, tmp_path):
    events = run(settings(train__steps=8, train__log_every=1), profile=2)
    (profiled,) = [event for event in events if isinstance(event, Profiled)]
    assert profiled.step == 5
    assert profiled.profile.steps == 2
    assert profiled.profile.parts["data"] > 0
    assert profiled.profile.trace == str(tmp_path / "run/profile-step-000004.json")
    assert Path(profiled.profile.trace).is_file()
    plain = run(settings("other", train__steps=8, train__log_every=1))
    losses = [[e.loss for e in each if isinstance(e, StepMetrics)] for each in (events, plain)]
    assert losses[0] == losses[1]


def test_profiling_more_steps_than_the_run_has_is_refused(settings, run):
    with pytest.raises(
        ConfigError, match="--profile: 4 steps after 3 to warm up, and the run has 6"
    ):
        run(settings(train__steps=6), profile=4)
