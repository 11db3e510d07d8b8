"""Workloads and arms, the input of a benchmark. No torch here: a fresh process reads these before
it loads torch, because the behaviour of waiting threads is decided before that."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.runtime.fresh_process import in_a_fresh_process
from pretrain_cli.engine.runtime.process_settings import set_compile_cache, set_env_before_torch
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.counting import training_flops

CPU_STEP_FLOPS = 1e12


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Work of a step: a model and its batch."""

    name: str
    """Name of the model, for people."""
    model: ModelConfig
    seq_len: int
    micro_batch_size: int
    device: str

    @property
    def tokens(self) -> int:
        """Tokens of a step, which is one micro-batch."""
        return self.seq_len * self.micro_batch_size


def usual_micro_batch(model: ModelConfig, seq_len: int, *, on_cpu: bool) -> int:
    """Samples that are timed where nothing is said: on a CPU as many as take seconds."""
    if not on_cpu:
        return 16
    affordable = CPU_STEP_FLOPS / (training_flops(model, seq_len).exact * seq_len)
    return max(1, min(4, int(affordable)))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run a workload."""

    name: str
    group: str = ""
    """Arms that are shown together."""
    workload: Workload
    speed: SpeedConfig
    peer: str = ""
    """The program whose step it is; ours where there is no name."""
    same_as: str = ""
    """The arm that it must learn the same as."""
    beside: str = ""
    """The arm whose speed its own is compared with."""
    forward_only: str = ""
    """Why its forward pass alone is timed."""
    left_out: str = ""
    """Why it is not run."""


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Repetitions of each arm."""

    rounds: int
    steps: int
    """Counted steps of a round."""
    warmup: int
    """Steps before them, timed apart."""


def run_timing(name: str, speed: SpeedConfig, compiled: Path, *arguments: Any) -> Any:
    """Return the result of `timing.NAME(*arguments)`, computed in a fresh process under these speed
    settings. Compiled kernels are cached in the folder `compiled`."""
    return in_a_fresh_process(_run_timing, name, speed, compiled, arguments)


def _run_timing(name: str, speed: SpeedConfig, compiled: Path, arguments: tuple[Any, ...]) -> Any:
    set_env_before_torch(speed)
    set_compile_cache(compiled)
    timing = importlib.import_module("pretrain_cli.engine.benchmark.timing")
    return getattr(timing, name)(*arguments)


def serve(ours: SpeedConfig | None, compiled: Path, arm: str, *arguments: Any) -> None:
    """Run `sample_arm.serve_arm` in a process that was just started: ours with these settings, as
    `pretrain sample` has them, or another program's."""
    if ours is not None:
        set_env_before_torch(ours)
    set_compile_cache(compiled)
    importlib.import_module("pretrain_cli.engine.benchmark.sample_arm").serve_arm(arm, *arguments)
