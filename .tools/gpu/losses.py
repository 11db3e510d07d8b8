"""Arms of the loss: those of `speed.chunked_loss`, and PyTorch's own where it has one."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.arms import choices
from pretrain_cli.model.loss import softmax_, with_z_loss
from pretrain_cli.targets import IGNORE_INDEX

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (B, T, D), weight (V, D), targets (B, T)) -> the mean loss, with gradients."""
WHOLE = "chunked_loss False"
"""The readable definition."""


def loss_arms(*, z_loss: float, compiled: bool) -> dict[str, Loss]:
    """Return the arms by name, the readable one first."""
    softmax = torch.compile(softmax_) if compiled else softmax_

    def arm(value: Any) -> Loss:
        def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return with_z_loss(
                hidden,
                weight,
                targets,
                normalizer=None,
                chunked=value,
                z_loss=z_loss,
                softmax=softmax,
            ).minimized

        return loss

    arms = {f"chunked_loss {value}": arm(value) for value in choices(SpeedConfig, "chunked_loss")}
    theirs = getattr(F, "linear_cross_entropy", None)  # torch 2.13
    if theirs is not None and not z_loss:
        arms["F.linear_cross_entropy"] = lambda hidden, weight, targets: theirs(
            hidden.flatten(0, 1),
            weight.to(hidden.dtype),
            targets.flatten(),
            ignore_index=IGNORE_INDEX,
        )
    return arms


def loss_inputs(
    tokens: int, width: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states (1, N, D), float32 weights (V, D), and targets of which some are
    ignored. Logits have a standard deviation of about 2."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(1, tokens, width, device=device, generator=generator).to(dtype)
    weight = torch.randn(vocab_size, width, device=device, generator=generator) * 2 / width**0.5
    targets = torch.randint(vocab_size, (1, tokens), device=device, generator=generator)
    targets[:, ::17] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), targets
