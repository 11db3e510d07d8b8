"""Matrix products with few rows on a CPU: what a token costs there is reading the matrices.

The library's product with one row, or eight, reads a matrix far slower than the memory gives it.
Two ways come nearer, both in float32 as in bfloat16:

    SummedLinear    one row, in a compiled graph: a sum along each of the matrix's rows, of which
                    the compiler makes a loop that reads every number once. The matrix is as it
                    was, so the head, where it is the embedding too, is there once.
    PackedLinear    any few rows, compiled or not: oneDNN's own layout, made once, by what
                    PyTorch's compiler itself uses when it is told that weights are constants
                    (mkldnn._reorder_linear_weight and _linear_pointwise).

Tried and left, for one row in float32, all slower than the sum: MKL's and oneDNN's products with
the matrix as it is, transposed or in blocks, torch.mv, and an embedding bag of the matrix's columns
weighted by the row, the fastest of them and faster than the packed layout. The sum with more rows
is slower than the packed layout; compiled by itself, to be called from a step that is not, it loses
much of what it gains.

A packed matrix is no tensor that torch.compile can pass around, so its product is an operator of
our own, which takes the matrix by its number in a table. The number is a tensor: a plain one would
be a constant of what is compiled, and every layer compiled anew.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.layers import GatedMLP, Projections

MakeLinear = Callable[[Tensor], nn.Module]

_PACKED: dict[int, Any] = {}
_library = torch.library.Library("pretrain", "DEF")
_library.define("packed_linear(Tensor x, Tensor number, int rows) -> Tensor")


def _product(x: Tensor, number: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _PACKED[int(number)], None, "none", [], "")


def _shape(x: Tensor, number: Tensor, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_library.impl("packed_linear", _product, "CPU")
torch.library.register_fake("pretrain::packed_linear", _shape, lib=_library)


def faster_linear(device: torch.device, rows: int | None, compiled: bool) -> MakeLinear | None:
    """Return a linear map that is faster than PyTorch's for this number of rows (None: any small
    number), or None."""
    if device.type != "cpu":
        return None
    if compiled and rows == 1:
        return SummedLinear
    return PackedLinear if torch.backends.mkldnn.is_available() else None


class PackedLinear(nn.Module):
    """x @ weight^T, x in the weight's type. (..., in) -> (..., out)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows = len(weight)
        number = max(_PACKED, default=0) + 1
        self.number = torch.tensor(number)
        _PACKED[number] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        weakref.finalize(self, _PACKED.pop, number)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.pretrain.packed_linear(x, self.number, self.rows)


class SummedLinear(nn.Module):
    """x @ weight^T, x in the weight's type. (..., in) -> (..., out). Compiled it is `summed`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        return (summed if torch.compiler.is_compiling() else F.linear)(x, self.weight)


def summed(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T by products and sums in float32. Not compiled, it holds all products at once."""
    return (written_down(x).unsqueeze(-2).float() * weight.float()).sum(-1).to(x.dtype)


def written_down(x: Tensor) -> Tensor:
    """The same, which the compiler puts into memory before it is used. It would else make it anew
    for each of a matrix's rows, from what x itself is made of: a norm, for example. (Whoever names
    strides needs memory that has them.)"""
    return x.as_strided(x.shape, x.stride())


class OneProduct(nn.Module):
    """Projections by one product. (..., in) -> one (..., rows) for each."""

    def __init__(self, rows: list[int], linear: nn.Module) -> None:
        super().__init__()
        self.rows, self.linear = rows, linear

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x).split(self.rows, dim=-1)


@torch.no_grad()
def replace_matrices(model: Decoder, make: MakeLinear) -> None:
    """Have the blocks' products made in another way, a layer at a time, of the matrices as they
    are stored. Experts stay as they are, and so do embedding and head, which the decoder reads by
    other ways too."""
    blocks: Any = model.blocks
    for block in blocks:
        attention, mlp = block.attention, block.mlp
        attention.qkv = _one_product(attention.qkv, make)
        attention.output = make(attention.output.weight)
        if isinstance(mlp, GatedMLP):
            whole: Any = mlp
            whole.gate_up = _one_product(whole.gate_up, make)
            whole.down = make(whole.down.weight)


def _one_product(projections: Projections | OneProduct, make: MakeLinear) -> OneProduct:
    weights: list[Tensor] = list(projections.parameters())
    return OneProduct(
        projections.rows, make(weights[0] if len(weights) == 1 else torch.cat(weights))
    )
