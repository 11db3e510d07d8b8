"""Times, memory and kernel counts on one device.

Times are taken with the GPU's own events: the host waits only after the last one. A step's time is
the time from the event before it to the event behind it, so it contains gaps in which the GPU waits
for the host. On a CPU the clock of the host is read.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pretrain_cli.engine.runs.metrics_file import peak_memory, reset_peak_memory
from pretrain_cli.engine.runtime.gpu_specs import stated_for
from pretrain_cli.spans import PREFIX

GB = 1e9


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Return the seconds of each of `count` calls in a row."""
    if device.type != "cuda":
        times = []
        for _ in range(count):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return times
    torch.cuda.synchronize(device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def first_call_s(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call on the host's clock, its compilation included."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def host_ms(call: Callable[[], object], device: torch.device, count: int = 3) -> float:
    """Return the host's milliseconds to launch one call on an idle device; median. If it is about
    the call's time, the GPU waits for the host."""
    times = []
    for _ in range(count):
        synchronize(device)
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    synchronize(device)
    return 1e3 * statistics.median(times)


def spread(seconds: Sequence[float], name: str = "step") -> dict[str, float]:
    """Return median, tenth and ninetieth percentile of times, in milliseconds."""
    ordered = sorted(1e3 * one for one in seconds)
    last = len(ordered) - 1
    return {
        f"{name}_median_ms": statistics.median(ordered),
        f"{name}_p10_ms": ordered[round(0.1 * last)],
        f"{name}_p90_ms": ordered[round(0.9 * last)],
    }


def call_figures(
    call: Callable[[], object], device: torch.device, *, count: int, warmup: int = 3
) -> dict[str, Any]:
    """Return times of a call after its warm-up, and the memory it takes beyond what it started
    with."""
    compile_s = first_call_s(call, device)
    time_calls(call, warmup - 1, device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    reset_peak_memory(device)
    times = time_calls(call, count, device)
    figures = spread(times, "call")
    return figures | {
        "call_count": count,
        "compile_s": max(0.0, compile_s - statistics.median(times)),
        "allocated_peak_gb": (peak_memory(device) - before) / GB,
    }


def peak_tflops(device: torch.device) -> float:
    """Return the stated dense bfloat16 peak, TFLOP/s: 989 on an H100 SXM or H200. 0 if unknown."""
    if device.type != "cuda":
        return 0.0
    stated = stated_for(torch.cuda.get_device_name(device))
    return stated.flops / 1e12 if stated else 0.0


def profiled(
    call: Callable[[], object], device: torch.device, *, calls: int, with_kernels: bool
) -> Any:
    """Return a profile of some calls, after one that is not counted."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda" and with_kernels:
        activities.append(ProfilerActivity.CUDA)
    call()
    synchronize(device)
    with profile(activities=activities, acc_events=True) as running:
        for _ in range(calls):
            call()
        synchronize(device)
    return running


def is_annotation(event: Any) -> bool:
    """Return whether a row is a named part of the program, which contains kernels."""
    named = event.key.startswith((PREFIX, "Optimizer.", "ProfilerStep"))
    return named or getattr(event, "is_user_annotation", False)


def kernels(running: Any, calls: int) -> list[dict[str, Any]]:
    """Return the kernels of a profile, slowest first: name, count and milliseconds per call, and
    the share of all kernels' time. Without a GPU, the host's operators."""
    from torch.autograd import DeviceType

    averages = running.key_averages()
    averages = [event for event in averages if not is_annotation(event)]
    on_device = [event for event in averages if event.device_type != DeviceType.CPU]
    own = {id(event): event.self_device_time_total for event in on_device}
    if not on_device:
        on_device = averages
        own = {id(event): event.self_cpu_time_total for event in on_device}
    whole = sum(own.values()) or 1.0
    rows = [
        {
            "kernel": event.key,
            "count_per_call": event.count / calls,
            "ms_per_call": own[id(event)] / 1e3 / calls,
            "share": own[id(event)] / whole,
        }
        for event in on_device
    ]
    return sorted(rows, key=lambda row: -row["ms_per_call"])
