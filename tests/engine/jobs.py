"""Jobs and batches of training steps, made by hand."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.timing import SameBatch
from pretrain_cli.engine.optim.optimizer import build_optimizer
from pretrain_cli.engine.planning.plan import StepPlan
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.peak_flops import Peak
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.engine.training.job import Job
from pretrain_cli.engine.training.prefetch import DeviceBatch
from pretrain_cli.model.attention_backends.mask import Documents
from pretrain_cli.model.decoder import LossWeights

ALONE = Ranks(0, 1, torch.device("cpu"))


class Unguarded:
    """Takes every step, as a training loop without a step guard does."""

    def step(self, optimizer: Optimizer, loss: Tensor, norm: Tensor) -> None:
        optimizer.step()


def batch_of(
    inputs: Tensor,
    targets: Tensor,
    documents: Tensor | None = None,
    counted: int | None = None,
) -> DeviceBatch:
    parts = None if documents is None else Documents(documents)
    return DeviceBatch(inputs, targets, parts, counted or targets.numel())


def job_of(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    micro_batch_size: int = 4,
    clip: float = 1.0,
    guard: Any = None,
    loss_weights: LossWeights | None = None,
) -> Job[StepPlan]:
    """Return a job of a step on one rank. By default it has the default optimizer and no guard."""
    settings = build_config({}, {"optimizer.clip": clip}, [])
    decoder: Any = model
    plan = StepPlan(
        settings=settings,
        name="test",
        model=decoder.config,
        speed=resolve_speed(SpeedConfig(), ALONE.device),
        seq_len=0,
        micro_batch_size=micro_batch_size,
        loss_weights=loss_weights,
    )
    return Job(
        plan=plan,
        ranks=ALONE,
        decoder=decoder,
        model=model,
        optimizer=optimizer or build_optimizer(decoder, settings.optimizer, fused=True),
        guard=guard or Unguarded(),
        batches=SameBatch(batch_of(torch.zeros(1, 1), torch.zeros(1, 1))),
        state=State(),
        peak=Peak(0.0, "not measured", 0.0),
    )
