"""The products of the layers' matrices in float8, to train on a GPU that multiplies in it.

    y  = q(x) q(W)^T       q rounds to e4m3, r to e5m2: a tensor as a whole, by one scale, with
    dx = r(dy) q(W)        which its largest value becomes the type's own. The scale is that of
    dW = r(dy)^T q(x)      the moment ("dynamic, tensorwise").

What stands between products is bfloat16, and so are all other products: the head's, those of router
and experts, and those inside attention. Weights, gradients and optimizer are float32 as ever.

Without gradients, as validation and samples are computed, all products are bfloat16: the loss of a
checkpoint is that of its weights, and the same wherever it is evaluated.

torchao would put modules of its own in the place of a model's. Here one of those, of no size, is
called with our weights: names, checkpoints, first weights and ranks know nothing of it.
"""

import importlib
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pretrain_cli.model import layers
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.layers import GatedMLP, Product

MULTIPLE = 16
"""Both sides of a matrix must be multiples of this for float8 products on a GPU."""


def no_float8(config: ModelConfig) -> str | None:
    """Why this model's products can't be in float8; None where they can."""
    sides = {
        "hidden_size": config.hidden_size,
        "num_attention_heads × head_dim": config.num_attention_heads * config.head_dim,
        "num_key_value_heads × head_dim": config.num_key_value_heads * config.head_dim,
    }
    if not all(config.is_sparse(layer) for layer in range(config.num_hidden_layers)):
        sides["intermediate_size"] = config.intermediate_size
    for name, side in sides.items():
        if side % MULTIPLE:
            return f"{name} is {side}, and it takes multiples of {MULTIPLE}"
    return None


def float8_product(*, emulated: bool = False) -> Product:
    """torchao's. Emulated, on any device, the rounded values are multiplied in float32."""
    quiet_torchao()
    torchao: Any = importlib.import_module("torchao.float8")
    whole, padded = (
        torchao.convert_to_float8_training(
            nn.Linear(MULTIPLE, MULTIPLE, bias=False, device="meta"),
            config=torchao.Float8LinearConfig(emulate=emulated, pad_inner_dim=pads),
        )
        for pads in (False, True)
    )

    def product(x: Tensor, weight: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return layers.product(x, weight)
        rows = x.numel() // x.shape[-1]  # dW is a sum over them
        linear = padded if rows % MULTIPLE else whole
        return functional_call(linear, {"weight": weight.to(x.dtype)}, (x,))

    return product


def quiet_torchao() -> None:
    """Before it is imported, by us or by transformers where it is installed: it warns of
    kernels that it can't load on this machine, and torch of how it registers its types."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def multiply_by(model: Decoder, product: Product) -> None:
    """Have it make the products that float8 is for."""
    blocks: Any = model.blocks
    for block in blocks:
        parts = [block.attention.qkv, block.attention.output]
        if isinstance(block.mlp, GatedMLP):
            parts += [block.mlp.gate_up, block.mlp.down]
        for part in parts:
            for linear in part.modules():  # projections that are apart have several
                linear.product = product
