"""Matrices in int8 with a scale for each row: half of what bfloat16 takes to read, a quarter of
float32, and on a CPU a token costs little but reading them.

    row of W  ≈  scale · q,    q = −127 … 127 whole,    scale = max |row| / 127

With the one row of activations that a token has, or some, a product is compiled: it reads q once,
makes floats of it and sums as many rows at once. With many, as of a prompt, it is the library's
with q as floats, which holds them exactly in bfloat16 too, and then scaled: the same sums.
Activations stay as they are, and so do the embedding, the norms and what is remembered of a text. A
head that is the embedding is quantized apart.

Tried and left: PyTorch's own product for such weights (_weight_int8pack_mm). In float32 it is
slower than oneDNN's product of floats, in bfloat16 no faster than that with more than a row; and
there it reads beyond rows whose width is no multiple of its vectors (torch 2.13).
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
"""Rows up to which int8 is faster than floats laid out anew (products.py), on two CPU cores."""


def _sums(x: Tensor, whole: Tensor, scales: Tensor) -> Tensor:
    """(rows, in), (out, in), (out,) -> (rows, out). The sums of all rows are one loop over q."""
    wide = whole.float()
    return torch.stack([(wide * row).sum(-1) for row in x.unbind()]) * scales


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled once for all sizes, for each number of rows. (To import the compiler takes a second;
    a model that isn't quantized has no need of it.)"""
    return torch.compile(_sums, dynamic=True)


class QuantizedLinear(nn.Module):
    """x @ weight^T, x in `dtype`. (..., in) -> (..., out)."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        wide = weight.detach().float()
        least = torch.finfo(torch.float32).tiny  # of a row of zeros
        scales = (wide.abs().amax(1) / 127).clamp(min=least)
        self.dtype = dtype
        self.sums = _compiled()
        self.whole: Tensor
        self.scales: Tensor
        self.register_buffer("whole", (wide / scales.unsqueeze(1)).round().to(torch.int8))
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:
        """The matrix that this multiplies by, as floats."""
        return (self.whole.float() * self.scales.unsqueeze(1)).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        # of a step a token a text, (B, in); a prompt has one dimension more
        if x.ndim == 2 and len(x) <= FEW[x.dtype] and x.device.type == "cpu":
            return self.sums(x.float(), self.whole, self.scales).to(x.dtype)
        return (F.linear(x, self.whole.to(x.dtype)) * self.scales).to(x.dtype)


def no_quantizing(config: ModelConfig) -> str | None:
    """Why a model is not quantized here; None where it can be."""
    if config.num_experts:
        return "the experts, which are most of a mixture's weights, are no single matrices"
    return None


@torch.no_grad()
def quantize(model: Decoder) -> None:
    """Put quantized matrices in the place of the decoder's own, a layer at a time."""
    reason = no_quantizing(model.config)
    assert reason is None, reason
    whole: Any = model
    head = QuantizedLinear(model.head_weight, model.dtype)
    model.config = replace(model.config, tie_word_embeddings=False)
    whole.head = head
    replace_matrices(model, lambda weight: QuantizedLinear(weight, model.dtype))


@torch.no_grad()
def as_floats(model: Decoder) -> None:
    """Put floats in the place of the quantized matrices, of the same values."""
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
