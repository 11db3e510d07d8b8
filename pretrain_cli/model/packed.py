"""Matrices laid out for products with few rows on a CPU: what a token costs there is reading them.

The library's product with one row, or eight, reads a matrix far slower than the memory gives it.
oneDNN's own layout, made once, comes near that with either, in float32 as in bfloat16: `pretrain
benchmark sample` gives the share. The way to it is what PyTorch's compiler itself uses when it is
told that weights are constants (mkldnn._reorder_linear_weight and _linear_pointwise).

Tried and left: a compiled (x · w).sum(-1), which reads as fast with one row and slower with more,
and must be compiled.

A packed matrix is no tensor that torch.compile can pass around, so a product is an operator of our
own, which takes the matrix by its number in a table.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.layers import GatedMLP, Projections

_PACKED: dict[int, Any] = {}
_library = torch.library.Library("pretrain", "DEF")
_library.define("packed_linear(Tensor x, int number, int rows) -> Tensor")


def _product(x: Tensor, number: int, rows: int) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _PACKED[number], None, "none", [], "")


def _shape(x: Tensor, number: int, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_library.impl("packed_linear", _product, "CPU")
torch.library.register_fake("pretrain::packed_linear", _shape, lib=_library)


def can_pack(device: torch.device) -> bool:
    return device.type == "cpu" and torch.backends.mkldnn.is_available()


class PackedLinear(nn.Module):
    """x @ weight^T, x in the weight's type. (..., in) -> (..., out)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows = len(weight)
        self.number = max(_PACKED, default=0) + 1
        _PACKED[self.number] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        weakref.finalize(self, _PACKED.pop, self.number)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.pretrain.packed_linear(x, self.number, self.rows)


class PackedProjections(nn.Module):
    """Projections, packed. (..., in) -> one (..., rows) for each."""

    def __init__(self, projections: Projections, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = projections.rows
        self.linear = PackedLinear(torch.cat([w.to(dtype) for w in projections.parameters()]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x).split(self.rows, dim=-1)


@torch.no_grad()
def pack_blocks(model: Decoder) -> None:
    """Put packed matrices in the place of the decoder's own, a layer at a time. Experts stay as
    they are, and so do embedding and head, which the decoder reads by other ways too."""
    dtype = model.dtype
    blocks: Any = model.blocks
    for block in blocks:
        attention = block.attention
        attention.qkv = PackedProjections(attention.qkv, dtype)
        attention.output = PackedLinear(attention.output.weight.to(dtype))
        if isinstance(block.mlp, GatedMLP):
            _pack_mlp(block.mlp, dtype)


def _pack_mlp(mlp: Any, dtype: torch.dtype) -> None:
    mlp.gate_up = PackedProjections(mlp.gate_up, dtype)
    mlp.down = PackedLinear(mlp.down.weight.to(dtype))
