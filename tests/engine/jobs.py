"""Jobs and batches of training steps, made by hand."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import OptimizerSettings, SpeedConfig
from pretrain_cli.engine.benchmark.timing import SameBatch
from pretrain_cli.engine.optim.optimizer import build_optimizer
from pretrain_cli.engine.optim.recipe import Recipe, make_recipe
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


def recipe_of(model: Any, **settings: Any) -> Recipe:
    """Return the recipe of a short run of a model, with AdamW at one rate unless it is changed."""
    plain = {
        "name": "adamw",
        "embedding_rate_scale": 1.0,
        "head_rate_scale": 1.0,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "embedding_decay_scale": 1.0,
        "muon_polynomial": "quintic",
        "muon_beta2": 0.0,
        "muon_cautious_decay": False,
    }
    asked = OptimizerSettings(**{**plain, **settings})
    return make_recipe(asked, getattr(model, "config", model), steps=100, tokens_per_step=1024)


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
        recipe=recipe_of(decoder, clip=clip),
        loss_weights=loss_weights,
    )
    return Job(
        plan=plan,
        ranks=ALONE,
        decoder=decoder,
        model=model,
        optimizer=optimizer or build_optimizer(decoder, plan.recipe, fused=True),
        guard=guard or Unguarded(),
        batches=SameBatch(batch_of(torch.zeros(1, 1), torch.zeros(1, 1))),
        state=State(),
        peak=Peak(0.0, "not measured", 0.0),
    )
