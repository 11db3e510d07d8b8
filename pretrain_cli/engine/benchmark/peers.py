"""Peers: the same training step, computed by other programs.

Each peer is built as its users would build it: its own model of the same shape, with our weights
and batch, float32 weights under autocast if the dtype is bfloat16, PyTorch's fused AdamW, and
gradient clipping. To add one, write a function that returns its step, and add a row to PEERS.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain_cli.engine.benchmark.workload import STEP_SETTINGS, Workload
from pretrain_cli.engine.evaluation.compare_transformers import import_transformers
from pretrain_cli.engine.runtime.speed import Speed
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.decoder import draw
from pretrain_cli.model.formats.hf_config import to_config_json
from pretrain_cli.model.parameter_map import Merged, parameter_map

Step = Callable[[], tuple[Tensor, Tensor | None]]
"""() -> (loss, gradient norm before clipping), on the device."""


@dataclass(frozen=True)
class Peer:
    """A program to compare with."""

    package: str
    """Name of the package to import."""
    extra: str
    """Extra of this project that installs it."""
    build: Callable[[Workload, Speed, Tensor, Tensor, float], Step]
    """(workload, speed, inputs, targets, learning rate) -> the peer's step."""


def _transformers(
    workload: Workload, speed: Speed, inputs: Tensor, targets: Tensor, rate: float
) -> Step:
    """Build transformers' model of the family, with sdpa attention and its own loss."""
    hf = import_transformers("--vs transformers")
    raw = to_config_json(workload.model, "float32")
    config = hf.AutoConfig.for_model(**raw)
    model = getattr(hf, raw["architectures"][0]).from_pretrained(
        None,
        config=config,
        state_dict=_weights(workload),
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    model.to(inputs.device).train()
    compiled = torch.compile(model) if speed.compile else model

    def loss() -> Tensor:
        # shift_labels: `targets` is already `inputs` shifted by one token, so no second shift
        return compiled(
            input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False
        ).loss

    return _step(model, loss, speed, inputs.device, rate)


PEERS = {"transformers": Peer("transformers", "verify", _transformers)}


def require(name: str) -> None:
    """Raise ConfigError if a peer is not installed."""
    peer = PEERS[name]
    if importlib.util.find_spec(peer.package) is None:
        raise ConfigError(
            f"--vs: {peer.package} is not installed; pip install 'pretrain[{peer.extra}]'"
        )


def _weights(workload: Workload) -> dict[str, Tensor]:
    """Return our model's initial weights by their published names."""
    pieces = parameter_map(workload.model, merged=Merged(False, False))
    return {piece.name: draw(workload.model, piece, 0) for piece in pieces}


def _step(
    model: nn.Module, loss: Callable[[], Tensor], speed: Speed, device: torch.device, rate: float
) -> Step:
    """Return a training step around a model's loss, with our weight decay."""
    settings = STEP_SETTINGS.optimizer
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    decay = settings.weight_decay
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=rate, betas=settings.betas, eps=settings.eps, fused=True
    )
    mixed = speed.compute_dtype != torch.float32

    def step() -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, speed.compute_dtype, enabled=mixed):
            found = loss()
        found.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found.detach(), norm

    return step
