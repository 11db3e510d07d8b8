"""Auxiliary losses of a step, read as numbers, and the load of each expert."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.transfer import to_host
from pretrain_cli.model.decoder import LossParts, LossWeights


class AuxiliaryLosses:
    """Auxiliary losses of one step, summed over its micro-steps on the device.

    The z-loss is a mean over the step's tokens, like the cross-entropy. The balancing loss is not:
    its f and P come from the tokens of one micro-step on one rank, as in transformers, and the step
    minimizes the token-weighted mean of these losses. A larger micro-batch therefore balances less
    strictly.
    """

    def __init__(self, weights: LossWeights) -> None:
        self.weights = weights
        self.sums: Tensor | None = None
        self.choices: Tensor | None = None

    def add(self, parts: LossParts) -> None:
        sums = torch.stack([parts.z_loss, parts.balancing])
        self.sums = sums if self.sums is None else self.sums + sums
        if parts.choices is not None:
            earlier = self.choices
            self.choices = parts.choices if earlier is None else earlier + parts.choices

    def start_read(self, ranks: Ranks) -> Callable[[], dict[str, Any]]:
        """Start reducing over all ranks and copying to the host. The result waits for the device
        and returns the fields of StepMetrics. Every rank must call this."""
        assert self.sums is not None, "no micro-step was added"
        sums = to_host(ranks.sum(self.sums) / ranks.world_size)
        choices = None if self.choices is None else to_host(ranks.sum(self.choices))
        return lambda: self._fields(sums(), choices() if choices else None)

    def _fields(self, sums: Tensor, choices: Tensor | None) -> dict[str, Any]:
        z_loss, balancing = sums.tolist()
        numbers: dict[str, Any] = {"z_loss": z_loss} if self.weights.z_loss else {}
        if choices is None:  # else (layers, E)
            return numbers
        shares = choices.sum(0) / choices.sum()
        return numbers | {
            "balancing_loss": balancing,
            "expert_load": [round(share, 6) for share in shares.tolist()],
            "expert_overload": (choices.amax(1) / choices.mean(1)).max().item(),
        }
