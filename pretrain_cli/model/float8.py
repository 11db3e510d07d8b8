"""Float8 matrix products of the layers, for training on GPUs that support them.

    y  = q(x) q(W)^T       q rounds to e4m3, r to e5m2. Each tensor has one scale, which maps
    dx = r(dy) q(W)        its largest value to the largest of the type, computed at each
    dW = r(dy)^T q(x)      use ("dynamic, tensorwise")

Everything between these products is bfloat16, as are all other products: those of the head, of
router and experts, and inside attention. Weights, gradients and optimizer stay float32.

Without gradients, in validation and sampling, all products are bfloat16. The loss of a checkpoint
therefore depends only on its weights.

torchao would replace the modules of a model. Here one torchao module without weights is called with
our weights, so names, checkpoints, initialization and sharding do not change.
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
    """Return the reason that this model cannot use float8; None if it can."""
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
    """Return torchao's product. `emulate` multiplies the rounded values in float32, on any
    device."""
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
        rows = x.numel() // x.shape[-1]  # dW sums over the rows
        linear = padded if rows % MULTIPLE else whole
        return functional_call(linear, {"weight": weight.to(x.dtype)}, (x,))

    return product


def quiet_torchao() -> None:
    """Silence warnings while torchao is imported, by us or by transformers: torchao warns of
    kernels that cannot load on this machine, and torch of the way torchao registers types."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def multiply_by(model: Decoder, product: Product) -> None:
    """Have the layers' matrices use this product."""
    blocks: Any = model.blocks
    for block in blocks:
        parts = [block.attention.qkv, block.attention.output]
        if isinstance(block.mlp, GatedMLP):
            parts += [block.mlp.gate_up, block.mlp.down]
        for part in parts:
            for linear in part.modules():  # separate projections have several
                linear.product = product
