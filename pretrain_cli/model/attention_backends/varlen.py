"""FlashAttention's kernels for sequences of any length, through PyTorch's varlen_attn.

Documents and windows take no mask: the rows of a batch are put end to end, and the kernel gets the
position at which each sequence starts, and how far back a query sees.

    rows of tokens      a a a b b      c c c c c          positions 0 … 9
    starts              0     3        5           10     after the last one: the number of tokens

The kernel does not compute what a window or a document hides. A window of W sees W keys, the query
among them: the kernel's `left` counts those before the query, W − 1.

Starts are made on the device, without waiting for it, once for a micro-batch. Their number differs
from step to step, and a compiled block would be compiled again for each: it is rounded up, and the
sequences that are too many are empty.

A whole sequence without window and documents is scaled_dot_product_attention's, which has faster
kernels for it; so are the few queries of a step with a cache.
"""

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_cli.model.attention_backends import sdpa
from pretrain_cli.model.attention_backends.backend import Backend, Conditions
from pretrain_cli.model.attention_backends.mask import Documents, Mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    varlen_attn = None

OPTIONS = inspect.signature(varlen_attn).parameters if varlen_attn else {}
SINGLE_SPLIT: dict[str, Any] = {"num_splits": 1} if "num_splits" in OPTIONS else {}
"""Training has enough rows to fill a GPU. Splitting the keys as well makes a sequence's result
depend on the others, and the automatic number of splits has given NaN
(github.com/pytorch/torchtitan/issues/3235)."""
CAPACITY = 64
"""The number of sequences is rounded up to a multiple of this."""


class Sequences(NamedTuple):
    """Sequences of a batch, end to end."""

    starts: Tensor
    """Position of each sequence's first token, then the number of tokens. Int32."""
    longest: int
    """No sequence is longer."""
    tokens: int
    """Number of tokens of all rows."""
    left: int
    """Number of keys before itself that a query sees; −1 for all."""


def _lower(mask: Mask, device: torch.device, dtype: torch.dtype) -> Any:
    if mask.is_plain_causal or mask.queries != mask.keys:
        return sdpa.lower(mask, device, dtype)
    left = -1 if mask.window is None or mask.window >= mask.keys else mask.window - 1
    if mask.documents is None:
        starts = torch.arange(mask.rows + 1, device=device, dtype=torch.int32) * mask.keys
    else:
        starts = starts_of(mask.documents)
    return Sequences(starts, mask.keys, mask.rows * mask.keys, left)


def starts_of(documents: Documents) -> Tensor:
    """Return where documents start in a batch's rows put end to end, and the number of tokens, as
    int32; padded with the latter to a length of 1 more than a multiple of CAPACITY."""
    starts = documents.starts.flatten()
    size = -(-documents.count // CAPACITY) * CAPACITY
    positions = torch.nonzero_static(starts, size=size, fill_value=len(starts)).flatten()
    padded = F.pad(positions.to(torch.int32), (0, 1), value=len(starts))
    torch._dynamo.mark_dynamic(padded, 0)  # pyright: ignore[reportPrivateUsage]
    return padded


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
    if not isinstance(mask, Sequences):
        return sdpa.attend(q, k, v, mask, scale)
    assert varlen_attn is not None
    shape, options = q.shape, dict(SINGLE_SPLIT)
    if q.shape[2] != k.shape[2]:
        if "enable_gqa" in OPTIONS:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B · T, heads, Dh)
    assert len(q) == mask.tokens, "the mask is of another number of rows"
    starts, longest = mask.starts, mask.longest
    out: Any = varlen_attn(
        q, k, v, starts, starts, longest, longest,
        scale=scale, window_size=(mask.left, 0), **options,
    )  # fmt: skip
    return out.view(shape)


def _unavailable(conditions: Conditions) -> str | None:
    device, head_dim = conditions.device, conditions.head_dim
    if varlen_attn is None:
        return "this PyTorch has no varlen_attn; it is there from 2.10 on"
    if device.type != "cuda":
        return f"PyTorch's varlen_attn has no kernel for {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "FlashAttention's kernels need compute capability 8.0"
    if conditions.dtype not in (torch.bfloat16, torch.float16):
        return "FlashAttention's kernels compute in bfloat16 and float16"
    if head_dim is not None and (head_dim > 256 or head_dim % 8):
        return f"FlashAttention has no kernel for a head_dim of {head_dim}"
    return None


def _preferred(conditions: Conditions) -> str | None:
    if conditions.device.type == "cuda":
        return "FlashAttention's kernels, which skip what windows and documents hide"
    return None


BACKEND = Backend(_lower, _attend, _unavailable, _preferred)
