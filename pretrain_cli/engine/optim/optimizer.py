"""Build the optimizer: AdamW, or another for the layers' matrices with AdamW for the rest."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from pretrain_cli.config.run_config import OptimizerSettings
from pretrain_cli.engine.optim.kinds import ADAMW_STATE, OPTIMIZERS
from pretrain_cli.engine.optim.muon import CHUNK_ELEMENTS, Muon, WithAdamW
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.parameter_map import EMBEDDING, HEAD, parameter_map, row_blocks


def _muon(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    on_gpu = groups[0]["params"][0].device.type == "cuda"
    chunk = CHUNK_ELEMENTS if on_gpu else None
    return Muon(groups, momentum=settings.momentum, chunk_elements=chunk)


MatrixOptimizer = Callable[[list[dict[str, Any]], OptimizerSettings], torch.optim.Optimizer]
MATRIX_OPTIMIZERS: dict[str, MatrixOptimizer] = {"muon": _muon}
"""(groups of the layers' matrices, settings) -> their optimizer, by its name in `OPTIMIZERS`.
AdamW needs none."""


def build_optimizer(
    model: Decoder, settings: OptimizerSettings, *, fused: bool
) -> AdamW | WithAdamW:
    """Return AdamW over every parameter, or the named optimizer for the layers' matrices and AdamW
    for the rest.

    `set_learning_rate` sets the rate at each step. Fused AdamW updates a group in one pass over its
    parameters; otherwise it makes one pass per operation.

    The state is allocated here, not at the first step: a lack of memory shows at once, and on a CPU
    long-lived tensors that are allocated before temporary ones leave the heap less fragmented.
    """
    groups = list(parameter_groups(model, settings))
    build = MATRIX_OPTIMIZERS.get(settings.name)
    matrices = [group for group in groups if build and group["name"] == "matrices"]
    others = [group for group in groups if not matrices or group["name"] != "matrices"]
    adamw = AdamW(
        others, lr=0.0, betas=settings.betas, eps=settings.eps, fused=fused, foreach=not fused
    )
    optimizer = WithAdamW(build(matrices, settings), adamw) if build and matrices else adamw
    for parameter, names in state_names(optimizer).items():
        state: dict[str, Tensor] = {name: torch.zeros_like(parameter) for name in names}
        if "exp_avg" in state:  # AdamW keeps a step count, Muon does not
            state["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
        optimizer.state[parameter] = state
    return optimizer


def parameter_groups(model: Decoder, settings: OptimizerSettings) -> Iterator[dict[str, Any]]:
    """Return parameter groups, which differ in weight decay and learning rate:

    | group      | parameters                                    | decayed | rate ×               |
    |------------|-----------------------------------------------|---------|----------------------|
    | embedding  | the embedding, and a head tied to it          | yes     | embedding_rate_scale |
    | head       | an untied head                                | yes     | head_rate_scale      |
    | matrices   | of attention, MLPs, experts and routers       | yes     | 1                    |
    | norms      | weights of all norms                          | no      | norm_rate_scale      |
    """
    kinds: dict[str, dict[str, nn.Parameter]] = {}
    parameters = dict(model.named_parameters())
    pieces = list(parameter_map(model.config, merged=model.merged))
    blocks = row_blocks(pieces)
    for piece in pieces:
        kind = {EMBEDDING: "embedding", HEAD: "head"}.get(piece.name, "matrices")
        kind = "norms" if piece.is_norm else kind
        kinds.setdefault(kind, {})[piece.parameter] = parameters[piece.parameter]
    scales = {
        "embedding": settings.embedding_rate_scale,
        "head": settings.head_rate_scale,
        "norms": settings.norm_rate_scale,
    }
    for kind, members in kinds.items():
        yield {
            "name": kind,
            "params": list(members.values()),
            "blocks": [blocks[name] for name in members],
            "weight_decay": 0.0 if kind == "norms" else settings.weight_decay,
            "rate_scale": scales.get(kind, 1.0),
            "state": OPTIMIZERS[settings.name].matrix_state if kind == "matrices" else ADAMW_STATE,
        }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]


def state_names(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[str, ...]]:
    """Return, for each parameter, the names of its state tensors of the parameter's shape."""
    return {
        parameter: group["state"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
