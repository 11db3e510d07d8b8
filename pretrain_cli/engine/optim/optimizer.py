"""Build the optimizer: AdamW, or another for the layers' matrices with AdamW for the rest."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from pretrain_cli.config.run_config import OptimizerSettings
from pretrain_cli.engine.optim.kinds import ADAMW_STATE, OPTIMIZERS
from pretrain_cli.engine.optim.muon import CHUNK_ELEMENTS, Muon, WithAdamW
from pretrain_cli.engine.optim.recipe import Recipe
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.parameter_map import EMBEDDING, HEAD, parameter_map, row_blocks


def _muon(
    groups: list[dict[str, Any]], settings: OptimizerSettings, dtype: torch.dtype
) -> torch.optim.Optimizer:
    on_gpu = groups[0]["params"][0].device.type == "cuda"
    return Muon(
        groups,
        momentum=settings.momentum,
        polynomial=settings.muon_polynomial,
        scale_rows=settings.muon_row_scaling,
        beta2=settings.muon_beta2,
        cautious=settings.muon_cautious_decay,
        dtype=torch.bfloat16 if on_gpu else dtype,
        chunk_elements=CHUNK_ELEMENTS if on_gpu else None,
    )


MatrixOptimizer = Callable[
    [list[dict[str, Any]], OptimizerSettings, torch.dtype], torch.optim.Optimizer
]
MATRIX_OPTIMIZERS: dict[str, MatrixOptimizer] = {"muon": _muon}
"""(groups of the layers' matrices, settings, type of matrix products) -> their optimizer, by its
name in `OPTIMIZERS`. AdamW needs none."""


def build_optimizer(
    model: Decoder, recipe: Recipe, *, fused: bool, dtype: torch.dtype = torch.float32
) -> AdamW | WithAdamW:
    """Return AdamW over every parameter, or the named optimizer for the layers' matrices and AdamW
    for the rest.

    `set_rates` sets the rates at each step. `dtype` is the type of the model's matrix products.
    Fused AdamW updates a group in one pass over its parameters; otherwise it makes one pass per
    operation.

    The state is allocated here, not at the first step: a lack of memory shows at once, and on a CPU
    long-lived tensors that are allocated before temporary ones leave the heap less fragmented.
    """
    settings = recipe.settings
    groups = list(parameter_groups(model, recipe))
    build = MATRIX_OPTIMIZERS.get(recipe.name)
    matrices = [group for group in groups if build and group["name"] == "matrices"]
    others = [group for group in groups if not matrices or group["name"] != "matrices"]
    adamw = AdamW(
        others, lr=0.0, betas=settings.betas, eps=settings.eps, fused=fused, foreach=not fused
    )
    optimizer = WithAdamW(build(matrices, settings, dtype), adamw) if build and matrices else adamw
    for parameter, names in state_names(optimizer).items():
        of_rows = OPTIMIZERS[recipe.name].row_state
        state: dict[str, Tensor] = {
            name: torch.zeros_like(parameter[..., :1] if name in of_rows else parameter)
            for name in names
        }
        if "exp_avg" in state:  # AdamW keeps a step count, Muon does not
            state["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
        optimizer.state[parameter] = state
    return optimizer


def parameter_groups(model: Decoder, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Return parameter groups, which differ in weight decay and learning rate:

    | group     | parameters                      | rate ×               | decay ×               |
    |-----------|---------------------------------|----------------------|-----------------------|
    | embedding | it, and a head tied to it       | embedding_rate_scale | embedding_decay_scale |
    | head      | an untied head                  | head_rate_scale      | embedding_decay_scale |
    | matrices  | attention, MLP, experts, router | 1                    | 1                     |
    | norms     | all                             | norm_rate_scale      | 0                     |
    """
    settings, kind_of = recipe.settings, OPTIMIZERS[recipe.name]
    kinds: dict[str, dict[str, nn.Parameter]] = {}
    parameters = dict(model.named_parameters())
    pieces = list(parameter_map(model.config, merged=model.merged))
    blocks = row_blocks(pieces)
    for piece in pieces:
        kind = {EMBEDDING: "embedding", HEAD: "head"}.get(piece.name, "matrices")
        kind = "norms" if piece.is_norm else kind
        kinds.setdefault(kind, {})[piece.parameter] = parameters[piece.parameter]
    table = settings.embedding_decay_scale
    scales = {
        "embedding": (recipe.embedding_rate_scale, table),
        "head": (recipe.head_rate_scale, table),
        "norms": (settings.norm_rate_scale, 0.0),
    }
    of_rows = kind_of.row_state if settings.muon_beta2 else ()
    for kind, members in kinds.items():
        rate_scale, decay_scale = scales.get(kind, (1.0, 1.0))
        yield {
            "name": kind,
            "params": list(members.values()),
            "blocks": [blocks[name] for name in members],
            "weight_decay": recipe.weight_decay * decay_scale,
            "decay": recipe.weight_decay * decay_scale,
            "rate_scale": rate_scale,
            "state": (*kind_of.matrix_state, *of_rows) if kind == "matrices" else ADAMW_STATE,
        }


def set_rates(optimizer: torch.optim.Optimizer, rates: StepRates) -> None:
    """Set each group's learning rate, weight decay and momentum for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rates.learning_rate * group["rate_scale"]
        group["weight_decay"] = rates.decay * group["decay"]
        if rates.momentum is not None and "momentum" in group:
            group["momentum"] = rates.momentum


def state_names(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[str, ...]]:
    """Return, for each parameter, the names of its state tensors."""
    return {
        parameter: group["state"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
