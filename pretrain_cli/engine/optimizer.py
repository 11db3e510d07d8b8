"""AdamW with decay on matrices only, and the learning rate of each step."""

import math

import torch
from torch import nn
from torch.optim import AdamW

from pretrain_cli.config import OptimizerSettings


def build_optimizer(model: nn.Module, settings: OptimizerSettings, *, fused: bool) -> AdamW:
    """AdamW over every parameter: matrices decayed, norms not. The rate is set at each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if p.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(
    step: int, *, peak: float, steps: int, warmup_steps: int, settings: OptimizerSettings
) -> float:
    """The rate of a step (counted from 0) out of `steps`.

    cosine    ╱‾╲_      wsd    ╱‾‾‾╲      constant    ╱‾‾‾‾
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    last = settings.final_fraction
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "wsd":
        left = min(1.0, (1.0 - progress) / settings.decay_fraction)
        return peak * (last + (1 - last) * left)
    return peak * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
