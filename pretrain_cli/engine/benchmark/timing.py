"""One round of an arm, in this process: times its steps and records its losses."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.peers import PEERS, Step
from pretrain_cli.engine.benchmark.workload import STEP_SETTINGS, Arm, Repeats, Workload
from pretrain_cli.engine.optim.recipe import make_recipe
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.engine.planning.plan import StepPlan
from pretrain_cli.engine.runs.metrics_file import peak_memory, reset_peak_memory
from pretrain_cli.engine.runtime.distributed import Ranks, find_device
from pretrain_cli.engine.runtime.peak_flops import Peak, find_peak
from pretrain_cli.engine.runtime.profiler import Profile, profile_steps
from pretrain_cli.engine.runtime.speed import (
    Speed,
    apply_process_settings,
    hides_keys,
    resolve_speed,
)
from pretrain_cli.engine.training.job import set_up, set_up_model
from pretrain_cli.engine.training.prefetch import DeviceBatch
from pretrain_cli.engine.training.step import train_step

LEARNING_RATE = 3e-4
"""Learning rate of every arm: high enough for the loss to fall within a few steps, so that an arm
that computes something else stands out."""
PEAK_SECONDS = 1.0
PROFILED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Round:
    """Measurements of one process; times in seconds."""

    tokens: int
    """Tokens of a step."""
    times: list[float]
    """Time of each counted step."""
    warmup: list[float]
    """Time of each warm-up step, compilation included."""
    losses: list[float]
    """Loss of every step, warm-up included. All steps use the same batch."""
    gradient_norms: list[float]
    """Norms before clipping; empty for a forward pass."""
    peak_memory: int
    """Peak bytes during the counted steps."""
    warmup_peak_memory: int
    """Peak bytes before these, including compilation."""
    speed: dict[str, Any]
    """Settings as requested and as in force."""


def resolve(workload: Workload, asked: SpeedConfig, *, training: bool = True) -> Speed:
    """Return the speed settings of a workload as training, or else evaluation, resolves them."""
    return resolve_speed(
        asked,
        torch.device(workload.device),
        training=training,
        model=workload.model,
        is_masked=hides_keys(workload.model, workload.seq_len, documents=False),
    )


def measure_round(arm: Arm, repeats: Repeats) -> Round:
    """Build the arm's step, warm it up and time it. Changes settings of the whole process."""
    device = find_device(arm.workload.device)
    speed = resolve(arm.workload, arm.speed, training=not arm.forward_only)
    apply_process_settings(speed)
    step = build_step(arm, speed, device)
    taken: list[tuple[Tensor, Tensor | None]] = []
    warmup = _timed(lambda: taken.append(step()), repeats.warmup, device)
    before = peak_memory(device)
    reset_peak_memory(device)
    times = _timed(lambda: taken.append(step()), repeats.steps, device)
    return Round(
        tokens=arm.workload.tokens,
        times=times,
        warmup=warmup,
        losses=[loss.item() for loss, _ in taken],
        gradient_norms=[norm.item() for _, norm in taken if norm is not None],
        peak_memory=peak_memory(device),
        warmup_peak_memory=before,
        speed=speed.record(),
    )


def measure_peak(device: str, asked: SpeedConfig) -> Peak:
    """Measure the FLOP/s of a matrix product under these settings."""
    place = find_device(device)
    speed = resolve_speed(asked, place, training=False)
    apply_process_settings(speed)
    return find_peak(place, speed.compute_dtype, seconds=PEAK_SECONDS)


def profile_arm(arm: Arm, repeats: Repeats, trace: str) -> Profile:
    """Profile the arm's step after the warm-up, and write a Chrome trace."""
    device = find_device(arm.workload.device)
    speed = resolve(arm.workload, arm.speed, training=not arm.forward_only)
    apply_process_settings(speed)
    step = build_step(arm, speed, device)
    for _ in range(repeats.warmup):
        step()
    return profile_steps(step, PROFILED_STEPS, device, trace)


def build_step(arm: Arm, speed: Speed, device: torch.device) -> Step:
    """Return a step of the arm: () -> (loss, gradient norm), on the device."""
    inputs, targets = synthetic_batch(arm.workload, device)
    if arm.peer:
        return PEERS[arm.peer].build(arm.workload, speed, inputs, targets, LEARNING_RATE)
    plan = StepPlan(
        settings=STEP_SETTINGS,
        name=arm.workload.name,
        model=arm.workload.model,
        speed=speed,
        seq_len=arm.workload.seq_len,
        micro_batch_size=arm.workload.micro_batch_size,
        recipe=make_recipe(
            STEP_SETTINGS.optimizer,
            arm.workload.model,
            steps=1,
            tokens_per_step=arm.workload.tokens,
        ),
        loss_weights=None,
    )
    if arm.forward_only:
        model = set_up_model(plan, device)

        @torch.no_grad()
        def forward() -> tuple[Tensor, None]:
            return model(inputs, targets).cross_entropy, None

        return forward
    batch = DeviceBatch(inputs, targets, documents=None, counted=targets.numel())
    job = set_up(plan, Ranks(0, 1, device), SameBatch(batch))

    def step() -> tuple[Tensor, Tensor]:
        result = train_step(job, job.batches.next(), StepRates(LEARNING_RATE))
        return result.loss, result.gradient_norm

    return step


class SameBatch:
    """Batch source of a benchmark: every step gets the same batch."""

    wait = 0.0

    def __init__(self, batch: DeviceBatch) -> None:
        self.batch = batch

    def next(self) -> DeviceBatch:
        return self.batch

    def at(self, sample: int) -> DeviceBatch:
        return self.batch

    def go_to(self, sample: int) -> None: ...

    def tokens_of(self, sample: int) -> tuple[int, np.ndarray]:
        return 0, self.batch.inputs[sample % len(self.batch.inputs)].numpy(force=True)

    def counts(self, sample: int) -> list[int]:
        return [sample]

    def close(self) -> None: ...


def synthetic_batch(workload: Workload, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B, T): random tokens, the same for every arm."""
    size = (workload.micro_batch_size, workload.seq_len + 1)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(workload.model.vocab_size, size, generator=generator).to(device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _timed(step: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Return the seconds of each step. Uses the GPU's own events, so that timing adds no
    synchronization."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    times = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        if device.type == "mps":
            torch.mps.synchronize()
        times.append(time.perf_counter() - began)
    return times
