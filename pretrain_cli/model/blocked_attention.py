"""Attention on a CPU: a block of queries at a time, against the keys that any of it sees.

    keys 0 … first … start … end          scores   q kᵀ            (queries, end − first)
              ┌───────┬──────┐            weights  softmax         PyTorch's kernel, one pass
    queries   │ all   │  ◣   │            out      weights · v
              └───────┴──────┘            what is seen by some is masked at the two ends alone

A block's scores are gone when it is done, and the backward pass makes them again: memory grows with
T, and time with T times what a query sees. The heads that share keys go through as one matrix.

PyTorch's fused attention for CPUs is slower in bfloat16, as it forms small products of its own (how
much: `pretrain benchmark --attn sdpa,blocks`). Tried and left: the softmax compiled, which is no
faster than PyTorch's kernel and compiles anew for every length of keys; blocks of 64 and 256.

It is an operator of its own (`pretrain::blocked_attention`), which torch.compile calls as it is:
traced, the scores of the forward pass would be kept for the backward pass.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 128


def _blocks(queries: int, keys: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Each block's queries, and the keys that any of them sees."""
    past = keys - queries
    for start in range(0, queries, BLOCK):
        end = min(start + BLOCK, queries)
        first = 0 if window is None else max(0, past + start - window + 1)
        yield slice(start, end), slice(first, past + end)


def _weights(
    q: Tensor, k: Tensor, rows: slice, seen: slice, window: int | None, documents: Tensor | None
) -> Tensor:
    """Softmax of a block's scores, (B·Hkv, G·rows, seen). q (B, Hkv, G, T, Dh), scaled, and
    k (B, Hkv, S, Dh).

    In a window each row sees one key more and one less than the row above it,
    so the first and last `rows` columns are all that need a mask.
    """
    B, Hkv, G = q.shape[:3]
    n, m = rows.stop - rows.start, seen.stop - seen.start
    scores = torch.bmm(_of(q, rows), k[:, :, seen].flatten(0, 1).mT).view(B, Hkv, G, n, m)
    row = torch.arange(n, device=q.device).unsqueeze(-1)
    later = torch.arange(n, device=q.device) > row
    scores[..., m - n :].masked_fill_(later, float("-inf"))
    if window is not None and m > window:  # the last row sees `window` keys, those above see …
        column = torch.arange(m - window, device=q.device)
        scores[..., : m - window].masked_fill_(column < row - (n - 1 - (m - window)), float("-inf"))
    if documents is not None:
        past = seen.stop - rows.stop
        of_query = documents[:, past + rows.start : past + rows.stop].unsqueeze(-1)
        others = of_query != documents[:, seen].unsqueeze(-2)  # (B, n, m)
        scores.masked_fill_(others[:, None, None], float("-inf"))
    return scores.softmax(-1).view(B * Hkv, G * n, m)


def _of(x: Tensor, rows: slice) -> Tensor:
    """A block of (B, Hkv, G, T, Dh), as a batch of matrices: (B·Hkv, G·rows, Dh)."""
    return x[:, :, :, rows].flatten(2, 3).flatten(0, 1)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(B, T, H, Dh) -> (B, Hkv, G, T, Dh): the query heads of each key head together."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


@torch.library.custom_op(
    "pretrain::blocked_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, int? window, Tensor? documents) -> Tensor",
)
def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, documents: Tensor | None
) -> Tensor:
    """q (B, T, H, Dh), k and v (B, S, Hkv, Dh), documents (B, S) or None -> (B, T, H, Dh)."""
    B, T, H, Dh = q.shape
    Hkv = k.shape[2]
    out = q.new_empty(B, T, H, Dh)
    grouped_out = _grouped(out, Hkv)
    q = _grouped(q * scale, Hkv)
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))  # (B, Hkv, S, Dh)
    for rows, seen in _blocks(T, k.shape[2], window):
        weights = _weights(q, k, rows, seen, window, documents)
        block = torch.bmm(weights, v[:, :, seen].flatten(0, 1))
        grouped_out[:, :, :, rows] = block.view(grouped_out[:, :, :, rows].shape)
    return out


@torch.library.custom_op(
    "pretrain::blocked_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, float scale, int? window, "
    "Tensor? documents) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Those of keys and values are summed over blocks in float32."""
    softmax_backward = torch.ops.aten._softmax_backward_data
    Hkv = k.shape[2]
    dq = q.new_empty(q.shape)
    grouped_dq = _grouped(dq, Hkv)
    q, grad = _grouped(q * scale, Hkv), _grouped(grad, Hkv)
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    wide = torch.promote_types(k.dtype, torch.float32)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for rows, seen in _blocks(q.shape[3], k.shape[2], window):
        weights = _weights(q, k, rows, seen, window, documents)
        g, keys, values = _of(grad, rows), k[:, :, seen].flatten(0, 1), v[:, :, seen].flatten(0, 1)
        dv[:, :, seen] += torch.bmm(weights.mT, g).view_as(v[:, :, seen])
        d_weights = torch.bmm(g, values.mT)
        d_scores = softmax_backward(d_weights, weights, -1, weights.dtype)
        dk[:, :, seen] += torch.bmm(d_scores.mT, _of(q, rows)).view_as(k[:, :, seen])
        block = torch.bmm(d_scores, keys).mul_(scale)
        grouped_dq[:, :, :, rows] = block.view(grouped_dq[:, :, :, rows].shape)
    dk, dv = (x.to(k.dtype).transpose(1, 2).contiguous() for x in (dk, dv))
    return dq, dk, dv


@blocked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.scale, ctx.window, documents = inputs
    ctx.save_for_backward(q, k, v, documents)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, documents = ctx.saved_tensors
    return *_backward(grad, q, k, v, ctx.scale, ctx.window, documents), None, None, None


blocked_attention.register_autograd(_gradients, setup_context=_save)
