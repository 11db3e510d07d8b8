"""Blocked attention for CPUs: each block of queries attends to the keys that any of its queries
sees.

    keys 0 … first … start … end          scores   q kᵀ            (queries, end − first)
              ┌───────┬──────┐            weights  softmax         PyTorch's kernel, one pass
    queries   │ all   │  ◣   │            out      weights · v
              └───────┴──────┘            only the two ends need a mask

A block's scores are freed after the block and recomputed in the backward pass. Memory therefore
grows with T, and time with T times the number of visible keys. For each query, the heads that share
keys are adjacent in memory, so all of them form one matrix per block, without a copy.

PyTorch's fused attention for CPUs is slower in bfloat16, because it computes small products by
itself; `pretrain benchmark --attn sdpa,blocks` measures it. Tried and slower: a compiled softmax,
masked_fill_ instead of an additive mask, fewer heads at a time, blocks of 64 and 256.

The operator is opaque to torch.compile (`pretrain::blocked_attention`): if it were traced, the
scores of the forward pass would be kept for the backward pass. The code that arranges queries and
keys for it is traced, and fused with their rotation.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain_cli.model.attention_backends.backend import Backend, Conditions
from pretrain_cli.model.attention_backends.mask import Mask

QUERIES_PER_BLOCK = 128


class Hidden(NamedTuple):
    """Window and documents, which hide keys that a causal mask shows."""

    window: int | None
    """None if it is no shorter than the keys."""
    documents: Tensor | None
    """Document numbers, (B, S)."""


def _lower(mask: Mask, device: torch.device, dtype: torch.dtype) -> Hidden:
    cuts = mask.window is not None and mask.window < mask.keys
    numbers = None if mask.documents is None else mask.documents.numbers
    return Hidden(mask.window if cuts else None, numbers)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Hidden, scale: float) -> Tensor:
    """Attend. q (B, T, H, Dh), k and v (B, S, Hkv, Dh) -> (B, T, H, Dh)."""
    B, T, H, Dh = q.shape
    Hkv = k.shape[2]
    q = (q * scale).view(B, T, Hkv, -1, Dh).transpose(1, 2)
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    out: Tensor = _attend(q.contiguous(), k, v, mask.window, mask.documents)
    return out.transpose(1, 2).reshape(B, T, H, Dh)


def _blocks(queries: int, keys: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield each block's range of queries and the range of keys that any of them sees."""
    past = keys - queries
    for start in range(0, queries, QUERIES_PER_BLOCK):
        end = min(start + QUERIES_PER_BLOCK, queries)
        first = 0 if window is None else max(0, past + start - window + 1)
        yield slice(start, end), slice(first, past + end)


def _of(x: Tensor, rows: slice) -> Tensor:
    """Return a block of (B, Hkv, T, G, Dh) as a batch of matrices, (B·Hkv, rows·G, Dh): a view."""
    return x.flatten(0, 1)[:, rows].flatten(1, 2)


def _weights(
    q: Tensor, k: Tensor, rows: slice, seen: slice, window: int | None, documents: Tensor | None
) -> Tensor:
    """Return the softmax of a block's scores, (B·Hkv, rows·G, keys).

    With a window, each row sees one key more at the end and one less at the start than the row
    above it, so only the first and last `rows` columns need a mask.
    """
    B, Hkv, _, G, _ = q.shape
    n, m = rows.stop - rows.start, seen.stop - seen.start
    scores = torch.bmm(_of(q, rows), k.flatten(0, 1)[:, seen].mT)
    by_query = scores.view(B, Hkv, n, G, m)
    by_query[..., m - n :] += _infinite(q, n, n).triu(1).unsqueeze(1)
    if window is not None and m > window:  # hide keys before the window
        by_query[..., : m - window] += _infinite(q, n, m - window).tril(m - window - n).unsqueeze(1)
    if documents is not None:
        past = seen.stop - rows.stop
        query_documents = documents[:, past + rows.start : past + rows.stop].unsqueeze(-1)
        same = query_documents == documents[:, seen].unsqueeze(-2)  # (B, n, m)
        by_query += _infinite(q, *same.shape).masked_fill(same, 0.0)[:, None, :, None]
    return scores.softmax(-1)


def _infinite(like: Tensor, *shape: int) -> Tensor:
    """Return a block of −∞ that hides keys when added to scores."""
    return like.new_full(shape, float("-inf"))


@torch.library.custom_op("pretrain::blocked_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Tensor | None
) -> Tensor:
    """Attend. q (B, Hkv, T, G, Dh), scaled, k and v (B, Hkv, S, Dh), all contiguous -> as q."""
    out = torch.empty_like(q)
    values = v.flatten(0, 1)
    for rows, seen in _blocks(q.shape[2], k.shape[2], window):
        weights = _weights(q, k, rows, seen, window, documents)
        torch.bmm(weights, values[:, seen], out=_of(out, rows))
    return out


@torch.library.custom_op("pretrain::blocked_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. Those of k and v are accumulated over blocks in
    float32."""
    softmax_backward = torch.ops.aten._softmax_backward_data
    grad, dq = grad.contiguous(), torch.empty_like(q)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    wide = torch.promote_types(k.dtype, torch.float32)
    dk, dv = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
    for rows, seen in _blocks(q.shape[2], k.shape[2], window):
        weights, g = _weights(q, k, rows, seen, window, documents), _of(grad, rows)
        dv[:, seen] += torch.bmm(weights.mT, g)
        d_weights = torch.bmm(g, values[:, seen].mT)
        d_scores = softmax_backward(d_weights, weights, -1, weights.dtype)
        dk[:, seen] += torch.bmm(d_scores.mT, _of(q, rows))
        torch.bmm(d_scores, keys[:, seen], out=_of(dq, rows))
    return dq, dk.to(k.dtype).view_as(k), dv.to(v.dtype).view_as(v)


@_attend.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.window, documents = inputs
    ctx.save_for_backward(q, k, v, documents)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, documents = ctx.saved_tensors
    return *_backward(grad, q, k, v, ctx.window, documents), None, None


_attend.register_autograd(_gradients, setup_context=_save)


def _unavailable(conditions: Conditions) -> str | None:
    return None if conditions.device.type == "cpu" else "it is made for CPUs"


def _preferred(conditions: Conditions) -> str | None:
    return "on a CPU the fastest" if conditions.device.type == "cpu" else None


BACKEND = Backend(_lower, attend, _unavailable, _preferred)
