"""Int8 matrices with one scale a row: half the bytes of bfloat16 and a quarter of float32, for
CPUs, where the cost of a token is reading the weights.

    row of W  ≈  scale · q,    q = −127 … 127,    scale = max |row| / 127

For one or a few rows of activations, the product is compiled: it reads q once, converts it and sums
several rows at once. For many rows, as in a prompt, PyTorch multiplies by q as floats, which even
bfloat16 represents exactly, and scales the result: the same sums. Activations, embedding, norms and
cache are not quantized. A tied head gets its own quantized copy.

Tried and rejected: PyTorch's product for such weights (_weight_int8pack_mm). In float32 it is
slower than oneDNN's product of floats; in bfloat16 it is no faster than that with more than one
row, and reads past rows whose width is no multiple of its vectors (torch 2.13).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.inference.cpu_linear import replace_matrices
from pretrain_cli.model.layers import Linear

FEW = {torch.float32: 4, torch.bfloat16: 2}
"""Largest number of rows for which int8 is faster than floats in packed layout (cpu_linear.py),
measured on two CPU cores."""


def _sums(x: Tensor, whole: Tensor, scales: Tensor) -> Tensor:
    """Return the products of rows and q. (rows, in), (out, in), (out,) -> (rows, out). One loop
    over q computes the sums of all rows."""
    wide = whole.float()
    return torch.stack([(wide * row).sum(-1) for row in x.unbind()]) * scales


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the compiled product, compiled once for all sizes of each row count. (Importing the
    compiler takes a second; only quantized models need it.)"""
    return torch.compile(_sums, dynamic=True)


class QuantizedLinear(nn.Module):
    """x @ weight^T, x in `dtype`. (..., in) -> (..., out)."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        wide = weight.detach().float()
        least = torch.finfo(torch.float32).tiny  # keeps the scale of a zero row positive
        scales = (wide.abs().amax(1) / 127).clamp(min=least)
        self.dtype = dtype
        self.sums = _compiled()
        self.whole: Tensor
        self.scales: Tensor
        self.register_buffer("whole", (wide / scales.unsqueeze(1)).round().to(torch.int8))
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:
        """Return the dequantized matrix."""
        return (self.whole.float() * self.scales.unsqueeze(1)).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        # x is (B, in) in a decoding step; a prompt has one more dimension
        if x.ndim == 2 and len(x) <= FEW[x.dtype] and x.device.type == "cpu":
            return self.sums(x.float(), self.whole, self.scales).to(x.dtype)
        return (F.linear(x, self.whole.to(x.dtype)) * self.scales).to(x.dtype)


def no_quantizing(config: ModelConfig) -> str | None:
    """Return the reason that a model cannot be quantized here; None if it can."""
    if config.num_experts:
        return "the experts, which are most of a mixture's weights, are no single matrices"
    return None


@torch.no_grad()
def quantize(model: Decoder) -> None:
    """Replace the decoder's matrices by quantized ones, one layer at a time."""
    reason = no_quantizing(model.config)
    assert reason is None, reason
    whole: Any = model
    head = QuantizedLinear(model.head_weight, model.dtype)
    model.config = replace(model.config, tie_word_embeddings=False)
    whole.head = head
    replace_matrices(model, lambda weight: QuantizedLinear(weight, model.dtype))


@torch.no_grad()
def as_floats(model: Decoder) -> None:
    """Replace quantized matrices by floats of the same values."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(module, name, _linear(child))


def _linear(quantized: QuantizedLinear) -> Linear:
    out = Linear(0, 0)
    out.weight = nn.Parameter(quantized.weight, requires_grad=False)
    return out


def is_quantized(model: Decoder) -> bool:
    return isinstance(getattr(model, "head", None), QuantizedLinear)
