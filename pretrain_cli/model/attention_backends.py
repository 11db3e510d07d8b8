"""Attention backends: four implementations behind one signature.

    attend(q, k, v, mask, scale)      q (B, T, H, Dh), k and v (B, S, Hkv, Dh) -> (B, T, H, Dh)

A Mask describes which keys each query sees. Each backend lowers it to its own form, once per step
and layer type, outside the layers:

    eager   a boolean matrix; the readable reference that the others are tested against
    sdpa    a flag, blocks, or an additive matrix: PyTorch's fused attention
    flex    a BlockMask: PyTorch's flex_attention, which skips fully masked blocks
    blocks  window and documents: blocks of queries by matrix products, for CPUs

The queries are the last T of S positions, so a cache of earlier keys needs no other mask:

    T = 3, S = 5, window 3:      keys 0 1 2 3 4
                        query 0       █ █ █ · ·
                        query 1       · █ █ █ ·
                        query 2       · · █ █ █

With document numbers, attention stays inside each document of a row:

    documents 0 0 0 1 1:         keys 0 1 2 3 4
                        query 0       █ · · · ·
                        query 1       █ █ · · ·
                        query 2       █ █ █ · ·
                        query 3       · · · █ ·
                        query 4       · · · █ █
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_cli.model.blocked_attention import blocked_attention
from pretrain_cli.model.counting import folds


@dataclass(frozen=True)
class Mask:
    """Causal mask: query i of T, at position S − T + i, sees all keys up to its position, or the
    last `window` of them, itself included. With `documents`, it sees only keys of its own
    document."""

    queries: int
    keys: int
    window: int | None
    documents: Tensor | None = None
    """Document number of each key, (B, S); None for a single document."""

    @property
    def is_plain_causal(self) -> bool:
        """True if neither a window nor documents hide any earlier key."""
        return self.documents is None and (self.window is None or self.window >= self.keys)

    def matrix(self, device: torch.device) -> Tensor:
        """Return a boolean matrix, True where a query sees a key. (T, S); with documents (B, T,
        S)."""
        key = torch.arange(self.keys, device=device)
        query = torch.arange(self.keys - self.queries, self.keys, device=device).unsqueeze(-1)
        seen = key <= query
        if self.window is not None:
            seen = seen & (key > query - self.window)
        if self.documents is not None:
            query_documents = self.documents[:, self.keys - self.queries :]
            seen = seen & (query_documents.unsqueeze(-1) == self.documents.unsqueeze(-2))
        return seen


@dataclass(frozen=True)
class Backend:
    """One implementation of attention."""

    lower: Callable[[Mask, torch.device, torch.dtype], Any]
    """(mask, device, dtype of q, k and v) -> the mask in the form that `attend` takes."""
    attend: Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]
    unavailable: Callable[[torch.device, bool], str | None]
    """(device, training) -> the reason this backend cannot run there, or None."""
    best_on: Mapping[str, str] = field(default_factory=dict)
    """Device types on which `auto` takes this backend, with the reason; `*` is every other type."""


def _always_available(device: torch.device, training: bool) -> None:
    return None


# --- eager ---------------------------------------------------------------------------------------


def _eager_lower(mask: Mask, device: torch.device, dtype: torch.dtype) -> Tensor:
    return mask.matrix(device).unsqueeze(-3)  # for every head


def _eager_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Compute softmax in float32 over the visible keys. Query head h reads key head h // (H /
    Hkv)."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype)
    return torch.einsum("bhts,bshd->bthd", weights, v)


# --- sdpa ----------------------------------------------------------------------------------------


class WindowBlocks(NamedTuple):
    """Masks of a sliding window over a whole sequence: for the first queries, and for blocks of the
    others."""

    window: int
    block: int
    blocks: int
    first: Tensor | bool
    """Mask of the first `window` queries: True for causal, or (B, 1, window, window)."""
    rest: Tensor
    """Mask of each later block on the `window` keys before it and on itself: (block, window +
    block) shared by all, or (B · blocks, 1, block, window + block)."""


def _sdpa_lower(
    mask: Mask, device: torch.device, dtype: torch.dtype
) -> Tensor | WindowBlocks | bool:
    """Return True for causal, False for no mask, WindowBlocks for a sliding window, or an additive
    mask: (1, T, S), or (B, 1, T, S) with documents."""
    if mask.is_plain_causal and mask.queries in (1, mask.keys):
        return mask.queries > 1
    if mask.window is not None and mask.window < mask.queries == mask.keys:
        return _fold(mask, mask.window, device, dtype)
    return _added(mask.matrix(device).unsqueeze(-3), dtype)


def _fold(mask: Mask, window: int, device: torch.device, dtype: torch.dtype) -> WindowBlocks:
    block, blocks = folds(mask.keys, window)
    i = torch.arange(block, device=device).unsqueeze(-1)
    j = torch.arange(window + block, device=device)
    seen = (j > i) & (j <= i + window)
    if mask.documents is None:
        return WindowBlocks(window, block, blocks, True, _added(seen, dtype))
    first = Mask(window, window, None, mask.documents[:, :window]).matrix(device).unsqueeze(1)
    documents = F.pad(mask.documents, (0, window + blocks * block - mask.keys))
    query_documents = documents[:, window:].unfold(1, block, block)  # (B, blocks, block)
    key_documents = documents.unfold(1, window + block, block)  # (B, blocks, window + block)
    rest = seen & (query_documents.unsqueeze(-1) == key_documents.unsqueeze(-2))
    rest = rest.flatten(0, 1).unsqueeze(1)
    return WindowBlocks(window, block, blocks, _added(first, dtype), _added(rest, dtype))


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask: 0 where a key is visible, −∞ elsewhere.

    PyTorch would convert a boolean mask to this in every layer, and keep each copy for the backward
    pass.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )


def _sdpa_attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | WindowBlocks | bool, scale: float
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, Dh)
    if isinstance(mask, WindowBlocks):
        return _folded(q, k, v, mask, scale).transpose(1, 2)
    return _sdpa(q, k, v, mask, scale).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | bool, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.device.type == "cuda" and isinstance(mask, Tensor):
        # The GPU kernel that takes a mask takes no grouped heads.
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        group = 1
    seen: dict[str, Any] = {"attn_mask" if isinstance(mask, Tensor) else "is_causal": mask}
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=group > 1, **seen)


def _folded(q: Tensor, k: Tensor, v: Tensor, mask: WindowBlocks, scale: float) -> Tensor:
    """Attend in a sliding window without a T × T mask: each block of queries sees the `window` keys
    before it and its own. (B, heads, T, Dh) -> (B, H, T, Dh).

    Time and memory grow with T · window. The first `window` queries are plain causal; the others
    run as a larger batch. A block has half a window of queries: kernels also compute masked scores,
    a third of all in this case, and each key is in memory three times.

        keys:     ├─── window before ───┼── block ──┤
        query 0   · █ █ █ █ █ █ █ █ █ █   █ · · · ·
        query 1   · · █ █ █ █ █ █ █ █ █   █ █ · · ·
    """
    B, H, T, Dh = q.shape
    window, block, blocks = mask.window, mask.block, mask.blocks
    first = _sdpa(q[:, :, :window], k[:, :, :window], v[:, :, :window], mask.first, scale)
    padding = window + blocks * block - T
    q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))

    def folded(x: Tensor, size: int) -> Tensor:
        """Windows of this size, one every block. -> (B · blocks, heads, size, Dh)."""
        windows = x.unfold(2, size, block).permute(0, 2, 1, 4, 3)  # (B, blocks, heads, size, Dh)
        return windows.reshape(B * blocks, x.shape[1], size, Dh)

    queries = folded(q[:, :, window:], block)
    keys, values = (folded(x, window + block) for x in (k, v))
    rest = _sdpa(queries, keys, values, mask.rest, scale)
    rest = rest.view(B, blocks, H, block, Dh).transpose(1, 2).reshape(B, H, blocks * block, Dh)
    return torch.cat((first, rest[:, :, : T - window]), dim=2)


# --- flex ----------------------------------------------------------------------------------------


def _flex_lower(mask: Mask, device: torch.device, dtype: torch.dtype) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    offset, window, documents = mask.keys - mask.queries, mask.window, mask.documents

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + offset
        seen = key <= position
        if window is not None:
            seen = seen & (key > position - window)
        if documents is not None:
            seen = seen & (documents[batch, key] == documents[batch, position])
        return seen

    batch = None if documents is None else len(documents)
    return create_block_mask(seen, batch, None, mask.queries, mask.keys, device=device)


def _flex_attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    attend = flex_attention if torch.compiler.is_compiling() else _flex_kernel(q.device.type)
    return attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


@functools.cache
def _flex_kernel(device_type: str) -> Callable[..., Any]:
    """Return flex_attention, compiled where it has kernels. Uncompiled it computes every score."""
    from torch.nn.attention.flex_attention import flex_attention

    if device_type == "cuda":
        return torch.compile(flex_attention, dynamic=False)
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    return flex_attention


def _flex_unavailable(device: torch.device, training: bool) -> str | None:
    if training and device.type == "cpu":
        return "PyTorch's flex_attention has no backward pass on a CPU"
    if device.type not in ("cpu", "cuda"):
        return f"PyTorch's flex_attention has no kernel for {device.type}"
    return None


# --- blocks --------------------------------------------------------------------------------------


class BlockMaskArgs(NamedTuple):
    """Arguments of flex's mask function, as in a Mask."""

    window: int | None
    documents: Tensor | None


def _blocks_lower(mask: Mask, device: torch.device, dtype: torch.dtype) -> BlockMaskArgs:
    cuts = mask.window is not None and mask.window < mask.keys
    return BlockMaskArgs(mask.window if cuts else None, mask.documents)


def _blocks_attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMaskArgs, scale: float) -> Tensor:
    return blocked_attention(q, k, v, scale, mask.window, mask.documents)


def _blocks_unavailable(device: torch.device, training: bool) -> str | None:
    return None if device.type == "cpu" else "it is made for CPUs"


BACKENDS: dict[str, Backend] = {
    "eager": Backend(_eager_lower, _eager_attend, _always_available),
    "sdpa": Backend(
        _sdpa_lower,
        _sdpa_attend,
        _always_available,
        best_on={"*": "PyTorch's fused kernels, sliding windows folded into blocks"},
    ),
    "flex": Backend(_flex_lower, _flex_attend, _flex_unavailable),
    "blocks": Backend(
        _blocks_lower, _blocks_attend, _blocks_unavailable, best_on={"cpu": "on a CPU the fastest"}
    ),
}


def best_backend(device: torch.device) -> tuple[str, str]:
    """Return the backend that `auto` takes on this device, and the reason."""
    for kind in (device.type, "*"):
        for name, backend in BACKENDS.items():
            if kind in backend.best_on:
                return name, backend.best_on[kind]
    raise AssertionError("no backend is the best on every other device")
