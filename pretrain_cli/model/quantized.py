"""Matrices in int8 with a scale for each row: half of what bfloat16 takes to read, a quarter of
float32, and on a CPU a token costs little but reading them.

    row of W  ≈  scale · q,    q = −127 … 127 whole,    scale = max |row| / 127

With few rows of activations a product is PyTorch's own for such weights. With many, as of a prompt,
it is the library's with q as floats, which holds them exactly in bfloat16 too, and then scaled: the
same sums. Activations stay as they are, and so do the embedding, the norms and what is remembered
of a text. A head that is the embedding is quantized apart.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.layers import Projections

FEW = 16
"""Rows up to which PyTorch's product for int8 weights is taken: it is made for one or some."""
VECTOR = 32
"""That a row's width must be a multiple of for it: in bfloat16 it reads whole vectors, with others
beyond the row (torch 2.13: wrong sums, or a crash)."""


class QuantizedLinear(nn.Module):
    """x @ weight^T, x in `dtype`. (..., in) -> (..., out)."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        wide = weight.detach().float()
        least = torch.finfo(dtype).tiny  # of a row of zeros
        scales = (wide.abs().amax(1) / 127).clamp(min=least).to(dtype)
        whole = (wide / scales.float().unsqueeze(1)).round().clamp(-127, 127)
        self.whole: Tensor
        self.scales: Tensor
        self.register_buffer("whole", whole.to(torch.int8))
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:
        """The matrix that this multiplies by."""
        return self.whole.to(self.scales.dtype) * self.scales.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= FEW and rows.shape[1] % VECTOR == 0 and x.device.type == "cpu":
            out = torch.ops.aten._weight_int8pack_mm(rows, self.whole, self.scales)
        else:
            out = F.linear(rows, self.whole.to(x.dtype)) * self.scales
        return out.view(*x.shape[:-1], -1)


class QuantizedProjections(nn.Module):
    """Projections, quantized. (..., in) -> one (..., rows) for each."""

    def __init__(self, projections: Projections, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = projections.rows
        self.linear = QuantizedLinear(torch.cat(list(projections.parameters())), dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x).split(self.rows, dim=-1)


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
    for block in whole.blocks:
        attention, mlp = block.attention, block.mlp
        attention.qkv = QuantizedProjections(attention.qkv, model.dtype)
        attention.output = QuantizedLinear(attention.output.weight, model.dtype)
        mlp.gate_up = QuantizedProjections(mlp.gate_up, model.dtype)
        mlp.down = QuantizedLinear(mlp.down.weight, model.dtype)


def is_quantized(model: Decoder) -> bool:
    return isinstance(getattr(model, "head", None), QuantizedLinear)
