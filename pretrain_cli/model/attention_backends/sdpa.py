"""PyTorch's fused attention: a causal flag, folded windows, or an additive matrix."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_cli.model.attention_backends.backend import Backend
from pretrain_cli.model.attention_backends.mask import Documents, Mask
from pretrain_cli.model.counting import folds

WIDE = torch.float32
GROUPED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
"""True if the GPU kernel for masks and float32 takes grouped heads. PyTorch 2.11 would compute the
whole matrix of scores instead (`torch._fused_sdp_choice`), so keys and values are repeated."""


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


def lower(mask: Mask, device: torch.device, dtype: torch.dtype) -> Tensor | WindowBlocks | bool:
    """Return True for causal, False for no mask, WindowBlocks for a sliding window, or an additive
    mask, (1, 1, T, S) or (B, 1, T, S): on a GPU, masks of three dimensions get a slower kernel."""
    if mask.is_plain_causal and mask.queries in (1, mask.keys):
        return mask.queries > 1
    if mask.window is not None and mask.window < mask.queries == mask.keys:
        return _fold(mask, mask.window, device, dtype)
    return _added(mask.matrix(device).unsqueeze(1), dtype)


def _fold(mask: Mask, window: int, device: torch.device, dtype: torch.dtype) -> WindowBlocks:
    block, blocks = folds(mask.keys, window)
    i = torch.arange(block, device=device).unsqueeze(-1)
    j = torch.arange(window + block, device=device)
    seen = (j > i) & (j <= i + window)
    if mask.documents is None:
        return WindowBlocks(window, block, blocks, True, _added(seen, dtype))
    numbers = mask.documents.numbers
    first = Mask(window, window, None, Documents(numbers[:, :window])).matrix(device).unsqueeze(1)
    numbers = F.pad(numbers, (0, window + blocks * block - mask.keys))
    query_numbers = numbers[:, window:].unfold(1, block, block)  # (B, blocks, block)
    key_numbers = numbers.unfold(1, window + block, block)  # (B, blocks, window + block)
    rest = seen & (query_numbers.unsqueeze(-1) == key_numbers.unsqueeze(-2))
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


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | WindowBlocks | bool, scale: float
) -> Tensor:
    """Attend. q (B, T, H, Dh), k and v (B, S, Hkv, Dh) -> (B, T, H, Dh)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, Dh)
    if isinstance(mask, WindowBlocks):
        return _folded(q, k, v, mask, scale).transpose(1, 2)
    return _fused(q, k, v, mask, scale).transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | bool, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    grouped = group > 1
    if grouped and q.is_cuda and not GROUPED and (isinstance(mask, Tensor) or q.dtype == WIDE):
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        grouped = False
    seen: dict[str, Any] = {"attn_mask" if isinstance(mask, Tensor) else "is_causal": mask}
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped, **seen)


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
    first = _fused(q[:, :, :window], k[:, :, :window], v[:, :, :window], mask.first, scale)
    padding = window + blocks * block - T
    q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))

    def folded(x: Tensor, size: int) -> Tensor:
        """Windows of this size, one every block. -> (B · blocks, heads, size, Dh)."""
        windows = x.unfold(2, size, block).permute(0, 2, 1, 4, 3)  # (B, blocks, heads, size, Dh)
        return windows.reshape(B * blocks, x.shape[1], size, Dh)

    queries = folded(q[:, :, window:], block)
    keys, values = (folded(x, window + block) for x in (k, v))
    rest = _fused(queries, keys, values, mask.rest, scale)
    rest = rest.view(B, blocks, H, block, Dh).transpose(1, 2).reshape(B, H, blocks * block, Dh)
    return torch.cat((first, rest[:, :, : T - window]), dim=2)


BACKEND = Backend(
    lower,
    attend,
    preferred=lambda _: "PyTorch's fused kernels, sliding windows folded into blocks",
)
