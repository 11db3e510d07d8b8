"""PyTorch's flex_attention: a compiled kernel that skips blocks of keys no query of a block sees.

A mask without documents is the same in every step and made once. With documents it is made for each
micro-batch, by a compiled function, as uncompiled it first makes a boolean matrix of every score.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pretrain_cli.compilers import no_triton
from pretrain_cli.model.attention_backends.backend import Backend, Conditions
from pretrain_cli.model.attention_backends.flash import flash_kernels
from pretrain_cli.model.attention_backends.mask import Mask

WIDE_HEADS = {
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 32,
    "bwd_BLOCK_M2": 32,
    "bwd_BLOCK_N2": 32,
    "bwd_num_warps": 8,
    "bwd_num_stages": 1,
}
"""Backward kernel for a head_dim over 128. Compiled for an H100 at 256, its own choice spills 1,608
bytes a thread out of the registers; this one none."""
FLASH_BLOCK = (256, 128)
"""Queries and keys of a block that FlashAttention 4 needs."""


def _lower(mask: Mask, device: torch.device, dtype: torch.dtype) -> Any:
    if mask.documents is None:
        return _fixed_mask(mask.queries, mask.keys, mask.window, device)
    numbers = mask.documents.numbers
    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    seen = _seen(mask.keys - mask.queries, mask.window, numbers)
    return make(seen, len(numbers), None, mask.queries, mask.keys, device=device, **_block_size())


@functools.lru_cache(maxsize=8)
def _fixed_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Any:
    seen = _seen(keys - queries, window, None)
    return create_block_mask(seen, None, None, queries, keys, device=device, **_block_size())


def _block_size() -> dict[str, Any]:
    return {"BLOCK_SIZE": FLASH_BLOCK} if flash_kernels() == "FA4" else {}


def _seen(past: int, window: int | None, numbers: Tensor | None) -> Callable[..., Tensor]:
    """Return flex's mask function, as in a Mask; the first query is at position `past`."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + past
        seen = key <= position
        if window is not None:
            seen = seen & (key > position - window)
        if numbers is not None:
            seen = seen & (numbers[batch, key] == numbers[batch, position])
        return seen

    return seen


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    attend = flex_attention if torch.compiler.is_compiling() else _kernel(q.device.type)
    options: Any = _kernel_options(q.device.type, q.shape[-1], q.dtype)
    out = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=options)
    return out.transpose(1, 2)


def _kernel_options(device: str, head_dim: int, dtype: torch.dtype) -> dict[str, Any] | None:
    """Return what the kernel needs other than its own choices."""
    if device != "cuda":
        return None
    if flash_kernels() == "FA4":
        return {"BACKEND": "FLASH"}
    # Below 128 queries PyTorch takes a kernel for decoding, which has no gradients.
    options = {"FORCE_USE_FLEX_ATTENTION": True} if torch.is_grad_enabled() else {}
    return options | (WIDE_HEADS if head_dim > 128 and dtype.itemsize == 2 else {})


@functools.cache
def _kernel(device_type: str) -> Callable[..., Any]:
    """Return flex_attention, compiled where it has kernels. Uncompiled it computes every score."""
    if device_type == "cuda":
        return _compiled(flex_attention)
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    return flex_attention


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # torch.compile looks at .grad of each input, and q, k and v are no leaves.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    return torch.compile(function, dynamic=False)


def _unavailable(conditions: Conditions) -> str | None:
    device = conditions.device.type
    if conditions.training and device == "cpu":
        return "PyTorch's flex_attention has no backward pass on a CPU"
    if device not in ("cpu", "cuda"):
        return f"PyTorch's flex_attention has no kernel for {device}"
    if device == "cuda" and (reason := no_triton()):
        return f"PyTorch's flex_attention is compiled, and {reason}"
    return None


def _preferred(conditions: Conditions) -> str | None:
    if conditions.device.type == "cuda" and conditions.is_masked:
        return "skips the blocks of keys that windows and documents hide"
    return None


BACKEND = Backend(_lower, _attend, _unavailable, _preferred)
