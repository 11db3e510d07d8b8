"""Matrix products with few rows on a CPU, where the cost of a token is reading the matrices.

PyTorch's product with one to eight rows reads a matrix far below memory bandwidth. Two alternatives
come closer, in float32 and in bfloat16:

    SummedLinear    one row, in a compiled graph: a sum along each matrix row, compiled to a loop
                    that reads every number once. The matrix keeps its layout, so a tied head
                    and embedding stay one matrix.
    PackedLinear    a few rows, compiled or not: oneDNN's own layout, made once with the
                    functions that PyTorch's compiler uses for constant weights
                    (mkldnn._reorder_linear_weight and _linear_pointwise).

Tried for one row in float32, and slower than the sum: MKL's and oneDNN's products with the matrix
as it is, transposed or in blocks; torch.mv; and an embedding bag of the matrix's columns weighted
by the row, which was the fastest of these and faster than the packed layout. With more rows the sum
is slower than the packed layout. Compiled alone and called from an uncompiled step, it loses much
of its gain.

torch.compile cannot pass a packed matrix around, so the product is a custom operator that finds the
matrix by its number in a table. The number is a tensor: a Python integer would be a constant of the
graph, and every layer would be compiled again.
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
    """Return the linear map that beats PyTorch's for this number of rows, or None. `rows` None
    means any small number."""
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
    """Return x @ weight^T by products and sums in float32. Uncompiled, it holds all products at
    once."""
    return (written_down(x).unsqueeze(-2).float() * weight.float()).sum(-1).to(x.dtype)


def written_down(x: Tensor) -> Tensor:
    """Return x, and make the compiler materialize it. It would otherwise recompute x, for example a
    norm, for each row of a matrix. (Asking for strides forces it into memory.)"""
    return x.as_strided(x.shape, x.stride())


class OneProduct(nn.Module):
    """Merged projections by one product. (..., in) -> one (..., rows) for each."""

    def __init__(self, rows: list[int], linear: nn.Module) -> None:
        super().__init__()
        self.rows, self.linear = rows, linear

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x).split(self.rows, dim=-1)


@torch.no_grad()
def replace_matrices(model: Decoder, make: MakeLinear) -> None:
    """Replace the linear maps of the blocks, one layer at a time, using the stored matrices.
    Experts, embedding and head stay as they are; the decoder reads the latter two in other ways
    too."""
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
