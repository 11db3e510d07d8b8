"""Eager attention: a boolean matrix and a softmax, the readable reference of every other
backend."""

import torch
from torch import Tensor

from pretrain_cli.model.attention_backends.backend import Backend
from pretrain_cli.model.attention_backends.mask import Mask


def _lower(mask: Mask, device: torch.device, dtype: torch.dtype) -> Tensor:
    return mask.matrix(device).unsqueeze(1)  # for every head


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Compute softmax in float32 over the visible keys. Query head h reads key head h // (H /
    Hkv)."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype)
    return torch.einsum("bhts,bshd->bthd", weights, v)


BACKEND = Backend(_lower, _attend)
