"""Profile a few steps: a Chrome trace, the slowest operators, and the time of each part of a step.

    data        waiting for the batch
    forward     embedding and blocks
    loss        head and cross entropy; the chunked loss also computes their gradients here
    backward    backward pass
    optimizer   gradient clipping, the step guard, the update
    other       time between these parts

Profiling slows steps down, more so with small operators, so read the shares rather than the times.
On a GPU each part waits for its own kernels, which it doesn't in training.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity

from pretrain_cli.spans import PREFIX, span

PARTS = ("data", "forward", "loss", "backward", "optimizer")
STEP = "step"
WARMUP_STEPS = 3
"""Steps before the profiled ones, which fault memory in and compile kernels."""
TOP = 12


@dataclass(frozen=True)
class Operator:
    """One kind of operator; operators that it calls are not included."""

    name: str
    calls: float
    """Calls a step."""
    seconds: float
    """Seconds a step."""


@dataclass(frozen=True)
class Profile:
    """Profile of some steps. Seconds are means over the profiled steps."""

    steps: int
    seconds: float
    parts: dict[str, float]
    operators: list[Operator]
    trace: str
    """Path of the Chrome trace, for chrome://tracing or ui.perfetto.dev."""


class Profiler:
    """Profiler of `steps` steps, starting after the first `after` steps."""

    def __init__(self, steps: int, *, after: int, device: torch.device, trace: Path) -> None:
        self.first, self.end = after, after + steps
        self.device, self.trace = device, trace
        self.seen = 0
        self.running: Any = None
        self.profile: Profile | None = None
        """Result that `result` has not handed out yet; None without one."""

    def result(self) -> Profile | None:
        """Return the profile once, after its last step or `close`; else None."""
        profile, self.profile = self.profile, None
        return profile

    @contextmanager
    def step(self) -> Generator[None]:
        """Wrap one step; start and end the profile at the right steps."""
        if self.seen == self.first < self.end:
            self._start()
        with span(STEP) if self.running else nullcontext():
            yield
        self.seen += 1
        if self.running and self.seen == self.end:
            self.close()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # There is one cycle only, but torch 2.11 warns of discarded cycles without acc_events.
        self.running = torch.profiler.profile(activities=activities, acc_events=True)
        self.running.start()

    def close(self) -> None:
        """Stop profiling, write the trace, and summarize the steps so far, even if fewer."""
        if self.running is None:
            return
        running, self.running = self.running, None
        running.stop()
        self.trace.parent.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(self.trace))
        on_gpu = self.device.type == "cuda"
        steps = self.seen - self.first
        if steps:
            self.profile = summarize(running.key_averages(), steps, str(self.trace), on_gpu=on_gpu)


def profile_steps(
    step: Callable[[], object], steps: int, device: torch.device, trace: str
) -> Profile:
    """Return the profile of `steps` calls of `step`, after one unprofiled call."""
    profiler = Profiler(steps, after=1, device=device, trace=Path(trace))
    for _ in range(1 + steps):
        with profiler.step():
            step()
    assert profiler.profile is not None
    return profiler.profile


def summarize(averages: Any, steps: int, trace: str, *, on_gpu: bool) -> Profile:
    """Return parts and slowest operators from `averages`, torch's `key_averages()`.

    On a GPU a span has a second row of its name, the annotation of its kernels; and an operator's
    kernels have rows of their own beside the operator's.
    """
    named = {event.key: event for event in averages if event.device_type == DeviceType.CPU}

    def seconds(name: str) -> float:
        event = named.get(PREFIX + name)
        return event.cpu_time_total / 1e6 / steps if event else 0.0

    whole = seconds(STEP)
    parts = {name: seconds(name) for name in PARTS}
    parts["forward"] -= parts["loss"]  # the forward span contains the loss span
    parts["other"] = whole - sum(parts.values())

    def own(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [
        event
        for event in averages
        if event.device_type == device
        and not event.is_user_annotation
        and not event.key.startswith(PREFIX)
    ]
    events = sorted(events, key=own, reverse=True)[:TOP]
    operators = [Operator(e.key, e.count / steps, own(e) / 1e6 / steps) for e in events]
    return Profile(steps, whole, parts, operators, trace)
