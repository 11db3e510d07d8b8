"""Attention, three ways behind one signature.

    attend(q, k, v, mask, scale)      q (B, T, H, Dh), k and v (B, S, Hkv, Dh) -> (B, T, H, Dh)

A Mask says *what* may be seen. Each backend lowers it to its own form, once per step and kind of
layer, outside the layers:

    eager   a (T, S) matrix of booleans; the readable definition, and what the others are tested
            against
    sdpa    nothing, a flag, or blocks: PyTorch's fused attention
    flex    a BlockMask: PyTorch's flex_attention, which skips blocks that see nothing

The queries are the last T of the S positions, so a cache that holds earlier keys needs no other
mask:

    T = 3, S = 5, window 3:      keys 0 1 2 3 4
                        query 0       █ █ █ · ·
                        query 1       · █ █ █ ·
                        query 2       · · █ █ █
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Query i of T, at position S − T + i, sees the keys up to there: all, or the last `window`."""

    queries: int
    keys: int
    window: int | None

    @property
    def is_plain_causal(self) -> bool:
        """No window cuts anything off."""
        return self.window is None or self.window >= self.keys

    def matrix(self, device: torch.device) -> Tensor:
        """True where a query sees a key. (T, S)."""
        key = torch.arange(self.keys, device=device)
        query = torch.arange(self.keys - self.queries, self.keys, device=device).unsqueeze(-1)
        seen = key <= query
        return seen if self.window is None else seen & (key > query - self.window)


@dataclass(frozen=True)
class Backend:
    """One way to compute attention."""

    lower: Callable[[Mask, torch.device], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]
    unavailable: Callable[[torch.device, bool], str | None]
    """(device, training) -> why this backend can't serve them, or None."""


def _always_available(device: torch.device, training: bool) -> None:
    return None


# --- eager ---------------------------------------------------------------------------------------


def _eager_lower(mask: Mask, device: torch.device) -> Tensor:
    return mask.matrix(device)


def _eager_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax in float32 over the keys seen; query head h reads key head h // (H / Hkv)."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype)
    return torch.einsum("bhts,bshd->bthd", weights, v)


# --- sdpa ----------------------------------------------------------------------------------------


def _sdpa_lower(mask: Mask, device: torch.device) -> Tensor | int | bool:
    """True for causal, False for no mask at all, a window to fold by, or a (T, S) matrix."""
    if mask.queries == 1 and mask.is_plain_causal:
        return False
    if mask.queries != mask.keys:
        return mask.matrix(device)
    return True if mask.is_plain_causal else int(mask.window or 0)


def _sdpa_attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | int | bool, scale: float
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, Dh)
    if isinstance(mask, bool):
        out = _sdpa(q, k, v, scale, is_causal=mask)
    elif isinstance(mask, int):
        out = _folded(q, k, v, mask, scale)
    else:
        out = _sdpa(q, k, v, scale, attn_mask=mask)
    return out.transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, **mask: Any) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.device.type == "cuda" and "attn_mask" in mask:
        # The GPU kernel that takes a mask takes no grouped heads.
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        group = 1
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=group > 1, **mask)


def _folded(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Sliding window without a T × T mask: blocks of `window` queries, each seeing its own block
    and the one before it. (B, heads, T, Dh) -> (B, H, T, Dh).

    Time and memory grow with T · window. The first block has no predecessor and is plain causal;
    the others share one (window, 2 · window) mask and go through as a larger batch.

        keys:     ├── block n−1 ──┼── block n ──┤
        query 0   · █ █ █ █ █ █ █   █ · · · · ·
        query 1   · · █ █ █ █ █ █   █ █ · · · ·
    """
    B, H, T, Dh = q.shape
    first = _sdpa(q[:, :, :window], k[:, :, :window], v[:, :, :window], scale, is_causal=True)
    blocks = -(-T // window) - 1  # those after the first
    padding = (blocks + 1) * window - T
    q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))

    def folded(x: Tensor, size: int) -> Tensor:
        """Windows of this size, one every `window`. -> (B · blocks, heads, size, Dh)."""
        windows = x.unfold(2, size, window).permute(0, 2, 1, 4, 3)  # (B, blocks, heads, size, Dh)
        return windows.reshape(B * blocks, x.shape[1], size, Dh)

    i = torch.arange(window, device=q.device).unsqueeze(-1)
    j = torch.arange(2 * window, device=q.device)
    seen = (j > i) & (j <= i + window)
    rest = _sdpa(
        folded(q[:, :, window:], window),
        folded(k, 2 * window),
        folded(v, 2 * window),
        scale,
        attn_mask=seen,
    )
    rest = rest.view(B, blocks, H, window, Dh).transpose(1, 2).reshape(B, H, blocks * window, Dh)
    return torch.cat((first, rest[:, :, : T - window]), dim=2)


# --- flex ----------------------------------------------------------------------------------------


def _flex_lower(mask: Mask, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    offset, window = mask.keys - mask.queries, mask.window

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = key <= query + offset
        return causal if window is None else causal & (key > query + offset - window)

    return create_block_mask(seen, None, None, mask.queries, mask.keys, device=device)


def _flex_attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    attend = flex_attention if torch.compiler.is_compiling() else _flex_kernel(q.device.type)
    return attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


@functools.cache
def _flex_kernel(device_type: str) -> Callable[..., Any]:
    """flex_attention, compiled where its kernels are: uncompiled it forms every score."""
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


BACKENDS: dict[str, Backend] = {
    "eager": Backend(_eager_lower, _eager_attend, _always_available),
    "sdpa": Backend(_sdpa_lower, _sdpa_attend, _always_available),
    "flex": Backend(_flex_lower, _flex_attend, _flex_unavailable),
}
