"""Workloads and arms: the input of a benchmark. Imports no torch, because a fresh process must set
how threads wait before it loads torch."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain_cli.config.run_config import (
    ModelSettings,
    OptimizerSettings,
    RunConfig,
    SpeedConfig,
)
from pretrain_cli.engine.runtime.fresh_process import in_a_fresh_process
from pretrain_cli.engine.runtime.process_settings import set_compile_cache, set_env_before_torch
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.counting import training_flops

CPU_STEP_FLOPS = 1e12
STEP_SETTINGS = RunConfig(
    model=ModelSettings(initialization="normal"),
    optimizer=OptimizerSettings(
        name="adamw",
        betas=(0.9, 0.95),
        eps=1e-8,
        embedding_rate_scale=1.0,
        head_rate_scale=1.0,
        weight_decay=0.1,
        embedding_decay_scale=1.0,
    ),
)
"""Settings of every timed step, ours and other programs': AdamW with one learning rate, because
the others have no Muon."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Work of a step: a model and a batch shape."""

    name: str
    """Name of the model, for display."""
    model: ModelConfig
    seq_len: int
    micro_batch_size: int
    device: str

    @property
    def tokens(self) -> int:
        """Tokens of a step, which is one micro-batch."""
        return self.seq_len * self.micro_batch_size


def usual_micro_batch(model: ModelConfig, seq_len: int, *, on_cpu: bool) -> int:
    """Return the default number of samples: on a CPU, as many as take seconds. On a GPU 8: with 16
    of 1,024 tokens, transformers beside us takes 79 of 80 GB for qwen3-0.6b."""
    if not on_cpu:
        return 8
    affordable = CPU_STEP_FLOPS / (training_flops(model, seq_len).exact * seq_len)
    return max(1, min(4, int(affordable)))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of running a workload."""

    name: str
    group: str = ""
    """Label of arms that are shown together."""
    workload: Workload
    speed: SpeedConfig
    peer: str = ""
    """Program whose step is timed; empty for ours."""
    same_as: str = ""
    """Name of the arm whose results it must equal; empty for none."""
    beside: str = ""
    """Name of the arm whose speed it is compared with; empty for none."""
    forward_only: str = ""
    """Reason for timing only the forward pass; empty to time training."""
    left_out: str = ""
    """Reason it is not run; empty if it is."""


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Numbers of repetitions of each arm."""

    rounds: int
    steps: int
    """Counted steps of a round."""
    warmup: int
    """Steps before them, timed separately."""


def run_timing(name: str, speed: SpeedConfig, compiled: Path, *arguments: Any) -> Any:
    """Run `timing.NAME(*arguments)` in a fresh process under these speed settings and return its
    result. `compiled` is the folder that caches compiled kernels."""
    return in_a_fresh_process(_run_timing, name, speed, compiled, arguments)


def _run_timing(name: str, speed: SpeedConfig, compiled: Path, arguments: tuple[Any, ...]) -> Any:
    set_env_before_torch(speed)
    set_compile_cache(compiled)
    timing = importlib.import_module("pretrain_cli.engine.benchmark.timing")
    return getattr(timing, name)(*arguments)


def serve(ours: SpeedConfig | None, compiled: Path, arm: str, *arguments: Any) -> None:
    """Run `sample_arm.serve_arm` in this fresh process: ours with process settings as in `pretrain
    sample`, or another program's."""
    if ours is not None:
        set_env_before_torch(ours)
    set_compile_cache(compiled)
    importlib.import_module("pretrain_cli.engine.benchmark.sample_arm").serve_arm(arm, *arguments)
