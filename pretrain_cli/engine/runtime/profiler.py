"""A few steps looked into: a Chrome trace, the operators that take longest, and a step's parts.

    data        waiting for the batch
    forward     embedding and blocks
    loss        head and cross entropy; chunked, their gradients with it, which are formed there
    backward
    optimizer   clipping, the guard, the update
    other       what is between them

While steps are profiled they take longer, the more so the smaller their operators; shares are what
to read. On a GPU each part waits for its own work, which training doesn't.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from pretrain_cli.spans import PREFIX, span

PARTS = ("data", "forward", "loss", "backward", "optimizer")
STEP = "step"
WARMUP_STEPS = 3
"""Steps before those that are profiled: memory is faulted in, and kernels are compiled."""
TOP = 12


@dataclass(frozen=True)
class Operator:
    """One kind of operator, without those that it calls."""

    name: str
    calls: float
    """A step."""
    seconds: float
    """A step."""


@dataclass(frozen=True)
class Profile:
    """Profile of some steps; seconds are the average of a step, while profiled."""

    steps: int
    seconds: float
    parts: dict[str, float]
    operators: list[Operator]
    trace: str
    """For chrome://tracing or ui.perfetto.dev."""


class Profiler:
    """Profiles so many steps, after some that it leaves alone."""

    def __init__(self, steps: int, *, after: int, device: torch.device, trace: Path) -> None:
        self.first, self.end = after, after + steps
        self.device, self.trace = device, trace
        self.seen = 0
        self.running: Any = None
        self.profile: Profile | None = None
        """Once it is made."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step is taken inside."""
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
        # One cycle alone; without acc_events torch 2.11 warns that it would forget others.
        self.running = torch.profiler.profile(activities=activities, acc_events=True)
        self.running.start()

    def close(self) -> None:
        """With as many steps as there were."""
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
    """These steps, each a call of `step`, after one that sets the profiler up."""
    profiler = Profiler(steps, after=1, device=device, trace=Path(trace))
    for _ in range(1 + steps):
        with profiler.step():
            step()
    assert profiler.profile is not None
    return profiler.profile


def summarize(averages: Any, steps: int, trace: str, *, on_gpu: bool) -> Profile:
    """Parts and operators from torch's table of events."""
    named = {event.key: event for event in averages}

    def seconds(name: str) -> float:
        event = named.get(PREFIX + name)
        return event.cpu_time_total / 1e6 / steps if event else 0.0

    whole = seconds(STEP)
    parts = {name: seconds(name) for name in PARTS}
    parts["forward"] -= parts["loss"]  # which lies in it
    parts["other"] = whole - sum(parts.values())

    def own(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events = [event for event in averages if not event.key.startswith(PREFIX)]
    events = sorted(events, key=own, reverse=True)[:TOP]
    operators = [Operator(e.key, e.count / steps, own(e) / 1e6 / steps) for e in events]
    return Profile(steps, whole, parts, operators, trace)
