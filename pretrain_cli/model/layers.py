"""Layers of both families: linear maps, the norm, the gated MLP.

Parameters are stored in one type (float32 when training), and each layer casts its weight to the
type of its input. bfloat16 compute therefore needs no autocast, and a model loaded in bfloat16 runs
without changes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_cli.model.config import ModelConfig

Product = Callable[[Tensor, Tensor], Tensor]
"""x (..., in), weight (out, in) -> x @ weight^T (..., out), in x's type."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return PyTorch's linear product, with the weight cast to x's type."""
    return F.linear(x, weight.to(x.dtype))


class Linear(nn.Module):
    """x @ weight^T. (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.product: Product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


class Projections(nn.Module):
    """Several linear maps of the same input, merged into one matrix product or separate.

    (..., in) -> one (..., rows) for each name. Merged, their rows are stacked in `weight` in the
    order of the names; separate, each is a Linear of that name.
    """

    def __init__(self, in_features: int, rows: dict[str, int], *, merged: bool) -> None:
        super().__init__()
        self.rows = list(rows.values())
        self.merged = merged
        self.product: Product = product
        if merged:
            self.weight = nn.Parameter(torch.empty(sum(self.rows), in_features))
        else:
            for name, count in rows.items():
                self.add_module(name, Linear(in_features, count))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.merged:
            return self.product(x, self.weight).split(self.rows, dim=-1)
        return tuple(linear(x) for linear in self.children())


class RMSNorm(nn.Module):
    """Scale each vector to unit root mean square, then by a learned weight. (..., D) -> (..., D).

    Gemma 3 stores the weight minus one and multiplies in float32; Qwen 3 multiplies after casting
    back. In bfloat16 the two differ. Written out rather than F.rms_norm, which on a CPU is slower
    than this both eager and compiled, and rounds in another order than either family.
    """

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = config.rms_norm_eps
        self.zero_centered = config.norm_is_zero_centered

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.zero_centered:
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


def activate(name: str, gate: Tensor) -> Tensor:
    """Apply the MLP's activation, named as in config.json."""
    return F.silu(gate) if name == "silu" else F.gelu(gate, approximate="tanh")


class GatedMLP(nn.Module):
    """down(activation(gate(x)) · up(x)). (..., D) -> (..., D)."""

    def __init__(self, config: ModelConfig, *, merged: bool) -> None:
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        rows = {"gate_proj": width, "up_proj": width}
        self.gate_up = Projections(D, rows, merged=merged)
        self.down = Linear(width, D)
        self.activation = config.hidden_activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        return self.down(activate(self.activation, gate) * up)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, padding: int | None, waiting: list[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.like = {"size": weight.shape, "dtype": weight.dtype, "device": weight.device}
        ctx.padding, ctx.waiting = padding, waiting
        return F.embedding(tokens, weight, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        d_weight = ctx.waiting.pop() if ctx.waiting else torch.zeros(**ctx.like)
        if ctx.padding is not None:
            grads = (grads[0].masked_fill((tokens == ctx.padding).unsqueeze(-1), 0.0),)
        d_weight.index_add_(0, tokens.flatten(), grads[0].flatten(0, -2).to(d_weight.dtype))
        return None, d_weight, None, None


def lookup(tokens: Tensor, embedding: nn.Embedding, waiting: list[Tensor]) -> Tensor:
    """Embed tokens with a matrix that is also the head. (B, T) -> (B, T, D).

    Its backward pass, the last of a step, adds its rows to the head's gradient, which
    `cross_entropy` left in `waiting`. Autograd would create a second gradient of the vocabulary's
    size, mostly zeros, and add the two.
    """
    return _Lookup.apply(tokens, embedding.weight, embedding.padding_idx, waiting)
