"""Profiles: the parts and operators of a step. Without a profiler, spans cost nothing."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark import timing
from pretrain_cli.engine.benchmark.workload import Arm, Repeats, Workload
from pretrain_cli.engine.runs.events import Profiled, StepMetrics
from pretrain_cli.engine.runtime.profiler import summarize
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


def an_event(name, device_type, **times):
    """Return an event of one step, as torch's profiler records it."""
    numbers = {"cpu": (0, 0), "device": 0, "annotates": False} | times
    event = FunctionEvent(
        id=0, name=name, thread=0, start_us=numbers["cpu"][0], end_us=numbers["cpu"][1],
        device_type=device_type, is_user_annotation=numbers["annotates"], stack=[],
        use_device="cuda",
    )  # fmt: skip
    for kernel in [numbers["device"]] if numbers["device"] else []:
        event.append_kernel(f"kernel of {name}", 0, kernel)
    return event


def test_a_gpus_profile_counts_spans_and_kernels_once():
    spans = {"step": (0, 1000), "forward": (0, 500), "loss": (300, 400), "backward": (500, 900)}
    events = []
    for name, cpu in spans.items():
        events.append(an_event(f"pretrain: {name}", DeviceType.CPU, cpu=cpu, annotates=True))
        events.append(an_event(f"pretrain: {name}", DeviceType.CUDA, cpu=cpu, annotates=True))
    events.append(
        an_event("Optimizer.step#AdamW.step", DeviceType.CUDA, cpu=(0, 9), annotates=True)
    )
    events.append(an_event("aten::mm", DeviceType.CPU, cpu=(0, 10), device=250))
    events.append(an_event("sm90_gemm", DeviceType.CUDA, cpu=(20, 270)))
    recorded = EventList(events, use_device="cuda")
    recorded._build_tree()
    found = summarize(recorded.key_averages(), 1, "trace.json", on_gpu=True)
    parts = {"forward": 400e-6, "loss": 100e-6, "backward": 400e-6, "other": 100e-6}
    assert found.parts == pytest.approx({"data": 0, "optimizer": 0} | parts)
    (operator,) = found.operators
    assert (operator.name, operator.calls, operator.seconds) == ("sm90_gemm", 1, 250e-6)


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
