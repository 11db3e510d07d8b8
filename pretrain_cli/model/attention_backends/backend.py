"""The row that each attention backend is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain_cli.model.attention_backends.mask import Mask


@dataclass(frozen=True)
class Conditions:
    """Facts on which the choice of a backend depends."""

    device: torch.device
    dtype: torch.dtype
    """Dtype of q, k and v."""
    training: bool
    head_dim: int | None = None
    """Elements of a head; None if the model is not known yet."""
    is_masked: bool = False
    """True if a window shorter than the sequence, or documents, hide keys of whole sequences."""


def _never_refused(conditions: Conditions) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of attention."""

    lower: Callable[[Mask, torch.device, torch.dtype], Any]
    """(mask, device, dtype of q, k and v) -> the mask in the form that `attend` takes."""
    attend: Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]
    """(q, k, v, lowered mask, scale) -> (B, T, H, Dh)."""
    unavailable: Callable[[Conditions], str | None] = _never_refused
    """The reason this backend cannot run there, or None."""
    preferred: Callable[[Conditions], str | None] = _never_refused
    """The reason why `auto` takes this backend there, if none before it is taken; None if it is
    never taken there."""
