"""Training steps of one model at several shapes: ours, and transformers' beside it.

Ours are the steps that `pretrain train` takes: `set_up` and `train_step`. Theirs are those of
`pretrain benchmark --vs transformers`. Both keep their weights from one shape to the next, so that
a shape costs only its compilation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gpu.measure import GB, first_call_s, spread, time_calls
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.peers import PEERS
from pretrain_cli.engine.benchmark.timing import (
    LEARNING_RATE,
    Round,
    SameBatch,
    synthetic_batch,
)
from pretrain_cli.engine.benchmark.workload import STEP_SETTINGS, Workload
from pretrain_cli.engine.optim.recipe import make_recipe
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.engine.planning.memory_estimate import StepShape, estimate, speed_settings
from pretrain_cli.engine.planning.plan import StepPlan
from pretrain_cli.engine.runs.metrics_file import peak_memory, reset_peak_memory
from pretrain_cli.engine.runtime.distributed import Ranks, find_device
from pretrain_cli.engine.runtime.speed import Speed, hides_keys, resolve_speed
from pretrain_cli.engine.training.job import set_up
from pretrain_cli.engine.training.prefetch import DeviceBatch
from pretrain_cli.engine.training.step import train_step

Step = Callable[[], tuple[Tensor, Tensor | None]]
"""() -> (loss, gradient norm), on the device."""


class Ours:
    """Our training steps, of any batch shape."""

    def __init__(self, workload: Workload, asked: SpeedConfig) -> None:
        """Build the model. Changes settings of the whole process."""
        self.device = find_device(workload.device)
        masked = hides_keys(workload.model, workload.seq_len, documents=False)
        self.speed = resolve_speed(asked, self.device, is_masked=masked)
        settings = STEP_SETTINGS.model_copy(update={"speed": asked})
        plan = StepPlan(
            settings=settings,
            name=workload.name,
            model=workload.model,
            speed=self.speed,
            seq_len=workload.seq_len,
            micro_batch_size=workload.micro_batch_size,
            recipe=make_recipe(
                settings.optimizer, workload.model, steps=1, tokens_per_step=workload.tokens
            ),
            loss_weights=None,
        )
        batches = SameBatch(batch_of(workload, self.device))
        self.job = set_up(plan, Ranks(0, 1, self.device), batches)

    def step_of(self, workload: Workload) -> Step:
        """Return the step of this batch shape."""
        plan = replace(
            self.job.plan,
            seq_len=workload.seq_len,
            micro_batch_size=workload.micro_batch_size,
        )
        job, batch = replace(self.job, plan=plan), batch_of(workload, self.device)

        def step() -> tuple[Tensor, Tensor]:
            result = train_step(job, batch, StepRates(LEARNING_RATE))
            return result.loss, result.gradient_norm

        return step


class Theirs:
    """transformers' training steps. All shapes must have equally many tokens."""

    def __init__(self, workload: Workload, speed: Speed) -> None:
        device, self.speed = find_device(workload.device), speed
        self.batch = synthetic_batch(workload, device)
        self.step = PEERS["transformers"].build(workload, speed, *self.batch, LEARNING_RATE)

    def step_of(self, workload: Workload) -> Step:
        """Return the step of this batch shape."""
        for tensor in self.batch:  # the step holds these two
            tensor.resize_(workload.micro_batch_size, workload.seq_len)
        return self.step


def batch_of(workload: Workload, device: torch.device) -> DeviceBatch:
    inputs, targets = synthetic_batch(workload, device)
    return DeviceBatch(inputs, targets, documents=None, counted=targets.numel())


@dataclass
class Timed:
    """A step of one batch shape, and its rounds."""

    name: str
    step: Step
    workload: Workload
    program: str
    speed: dict[str, Any]
    """Settings as asked and as in force."""
    rounds: list[Round] = field(default_factory=list)
    compile_s: float = 0.0
    reserved: int = 0
    """Peak bytes that the allocator held in the first round."""
    others: dict[str, Any] = field(default_factory=dict)
    """Figures that are taken once."""

    def take_round(self, steps: int, warmup: int, device: torch.device, *, held: int = 0) -> None:
        """Time `steps` steps after `warmup` others, of which the first may compile. `held` are the
        bytes of other models on the device."""
        taken: list[tuple[Tensor, Tensor | None]] = []

        def step() -> None:
            taken.append(self.step())

        reset_peak_memory(device)
        first = first_call_s(step, device)
        warm = [first, *time_calls(step, warmup - 1, device)]
        before = peak_memory(device) - held
        reset_peak_memory(device)
        times = time_calls(step, steps, device)
        if not self.rounds:
            self.compile_s = max(0.0, first - min(times))
            if device.type == "cuda":
                self.reserved = torch.cuda.max_memory_reserved(device) - held
        self.rounds.append(
            Round(
                tokens=self.workload.tokens,
                times=times,
                warmup=warm,
                losses=[loss.item() for loss, _ in taken],
                gradient_norms=[norm.item() for _, norm in taken if norm is not None],
                peak_memory=peak_memory(device) - held,
                warmup_peak_memory=before,
                speed=self.speed,
            )
        )

    def figures(self) -> dict[str, Any]:
        """Return times over all rounds, and memory."""
        figures: dict[str, Any] = {
            **spread([seconds for each in self.rounds for seconds in each.times]),
            "rounds_median_ms": [spread(each.times)["step_median_ms"] for each in self.rounds],
            "counted_steps": sum(len(each.times) for each in self.rounds),
            "tokens_per_step": self.workload.tokens,
            "seq_len": self.workload.seq_len,
            "micro_batch_size": self.workload.micro_batch_size,
            "compile_s": self.compile_s,
            "allocated_peak_gb": max(each.peak_memory for each in self.rounds) / GB,
            "first_loss": self.rounds[0].losses[0],
            "last_loss": self.rounds[-1].losses[-1],
        }
        if self.reserved:
            figures["reserved_peak_gb"] = self.reserved / GB
        return figures | self.others


def estimate_gb(workload: Workload, speed: Speed, **changes: Any) -> float:
    """Return the project's estimate of a step's peak memory."""
    shape = StepShape(
        model=workload.model,
        seq_len=workload.seq_len,
        micro_batch_size=workload.micro_batch_size,
        device=find_device(workload.device).type,
        **(speed_settings(speed) | changes),
    )
    return estimate(shape).peak / GB
