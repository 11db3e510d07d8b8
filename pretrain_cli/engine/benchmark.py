"""What a training step costs here: the real `train_step`, on synthetic tokens.

Each arm runs in a fresh process: precision modes, the allocator's state and the process's peak
memory belong to a process, and would leak from one arm into the next. Warm-up, with the compiling
that it sets off, is timed apart from the steps.
"""

import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pretrain_cli.config import OptimizerSettings, SpeedConfig
from pretrain_cli.engine.distributed import Ranks, find_device
from pretrain_cli.engine.guard import Guard
from pretrain_cli.engine.metrics import peak_memory
from pretrain_cli.engine.optimizer import build_optimizer, set_learning_rate
from pretrain_cli.engine.peak import Peak
from pretrain_cli.engine.speed import (
    Speed,
    apply_process_settings,
    build_model,
    compile_blocks,
    resolve_speed,
)
from pretrain_cli.engine.step import train_step
from pretrain_cli.errors import ConfigError, did_you_mean
from pretrain_cli.model import counting
from pretrain_cli.model.attention_backends import BACKENDS
from pretrain_cli.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every arm runs."""

    model: ModelConfig
    seq_len: int
    micro_batch_size: int
    steps: int
    warmup: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One arm's result. Times are seconds, of steps after the warm-up."""

    attention: str
    kind: str
    """`training step`, or `forward only` where the backend can't train here."""
    reason: str
    """Why it is forward only."""
    step_median: float
    step_fastest: float
    step_slowest: float
    warmup: float
    """All warm-up steps together, with compiling."""
    tokens_per_second: float
    mfu: float
    mfu_conventional: float
    peak_memory: int
    loss: float
    speed: dict[str, Any]


def parse_backends(text: str) -> list[str]:
    """`eager,sdpa` or `all`."""
    names = list(BACKENDS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in BACKENDS:
            known = [*BACKENDS, "all"]
            raise ConfigError(
                f"--attn: '{name}' is not one of {', '.join(known)}{did_you_mean(name, known)}"
            )
    return list(dict.fromkeys(names))


def run_arms(
    workload: Workload, speed: SpeedConfig, backends: list[str], peak: Peak
) -> Iterator[Measurement]:
    """Each backend's measurement, as it is made."""
    for name in backends:
        arm = speed.model_copy(update={"attention": name})
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=fresh) as process:
            yield process.submit(measure, workload, arm, peak).result()


def measure(workload: Workload, asked: SpeedConfig, peak: Peak) -> Measurement:
    """One arm, in this process."""
    device = find_device(workload.device)
    reason = BACKENDS[asked.attention].unavailable(device, True)
    speed = resolve_speed(asked, device, training=reason is None)
    apply_process_settings(speed)
    times, warmup, loss = _time_steps(workload, speed, device, training=reason is None)
    median = statistics.median(times)
    tokens = workload.micro_batch_size * workload.seq_len
    flops = counting.training_flops(workload.model, workload.seq_len)
    share = tokens / median / peak.flops / (1 if reason is None else 3)  # forward: a third
    return Measurement(
        attention=speed.attention,
        kind="training step" if reason is None else "forward only",
        reason=reason or "",
        step_median=median,
        step_fastest=min(times),
        step_slowest=max(times),
        warmup=warmup,
        tokens_per_second=tokens / median,
        mfu=flops.exact * share,
        mfu_conventional=flops.conventional * share,
        peak_memory=peak_memory(device),
        loss=loss,
        speed=speed.record(),
    )


def _time_steps(
    workload: Workload, speed: Speed, device: torch.device, *, training: bool
) -> tuple[list[float], float, float]:
    """(seconds of each step, seconds of the warm-up, the last loss)."""
    model = build_model(workload.model, speed, device)
    model.initialize(0)
    compile_blocks(model, speed)
    optimizer = build_optimizer(model, OptimizerSettings(), fused=speed.fused_optimizer)
    set_learning_rate(optimizer, 1e-4)
    size = (workload.micro_batch_size, workload.seq_len + 1)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(workload.model.vocab_size, size, generator=generator).to(device)
    inputs, targets = windows[:, :-1], windows[:, 1:]
    guard = Guard(Ranks(0, 1, device))

    def step() -> float:
        if training:
            rows = workload.micro_batch_size
            loss, _ = train_step(
                model, optimizer, inputs, targets, micro_batch_size=rows, clip=1.0, guard=guard
            )
            guard.read()
        else:
            with torch.no_grad():
                loss = model(inputs, targets)
        return loss.item()  # waits for the device

    times = []
    began = time.perf_counter()
    for _ in range(workload.warmup):
        step()
    warmup = time.perf_counter() - began
    loss = 0.0
    for _ in range(workload.steps):
        began = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - began)
    return times, warmup, loss
