"""Arms of the loss: the values of `speed.chunked_loss`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.arms import choices
from pretrain_cli.model.loss import softmax_, with_z_loss
from pretrain_cli.model.loss_backends import LOSS_BACKENDS
from pretrain_cli.targets import IGNORE_INDEX

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (B, T, D), weight (V, D), targets (B, T)) -> the mean loss, with gradients."""
WHOLE = "chunked_loss False"
"""The readable definition."""


def loss_arms(device: torch.device, *, z_loss: float) -> dict[str, Loss]:
    """Return the arms that can run on the device by name, the readable one first. Other libraries'
    losses have no z-loss."""
    softmax = torch.compile(softmax_) if device.type == "cuda" else softmax_

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

    values = choices(SpeedConfig, "chunked_loss")
    missing = LOSS_BACKENDS if z_loss else missing_losses(device)
    return {f"chunked_loss {value}": arm(value) for value in values if value not in missing}


def missing_losses(device: torch.device) -> dict[str, str]:
    """Return the other libraries' losses that can't run on the device, with the reason."""
    reasons = {name: found.unavailable(device) for name, found in LOSS_BACKENDS.items()}
    return {name: reason for name, reason in reasons.items() if reason}


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
