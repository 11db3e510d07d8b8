"""Auxiliary losses of a step, read as numbers, and the load of each expert."""

from typing import Any

import torch
from torch import Tensor

from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.model.decoder import LossParts, LossWeights


class AuxiliaryLosses:
    """Auxiliary losses of one step, summed over its micro-steps on the device. Only `read`
    synchronizes the CPU with the device.

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

    def read(self, ranks: Ranks) -> dict[str, Any]:
        """Return the fields of StepMetrics, reduced over all ranks. Every rank must call this."""
        assert self.sums is not None, "no micro-step was added"
        z_loss, balancing = (ranks.sum(self.sums) / ranks.world_size).tolist()
        numbers: dict[str, Any] = {"z_loss": z_loss} if self.weights.z_loss else {}
        if self.choices is None:
            return numbers
        choices = ranks.sum(self.choices).cpu()  # (layers, E)
        shares = choices.sum(0) / choices.sum()
        return numbers | {
            "balancing_loss": balancing,
            "expert_load": [round(share, 6) for share in shares.tolist()],
            "expert_overload": (choices.amax(1) / choices.mean(1)).max().item(),
        }
