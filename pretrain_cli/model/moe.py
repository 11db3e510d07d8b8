"""A mixture of experts, as Qwen 3 has it: every token goes to its best K of E small gated MLPs.

The experts' matrices are stacked and multiplied group by group with `grouped_mm`: tokens are sorted
by expert, so each expert meets one run of rows. No loop over experts, no host synchronization, no
capacity limit, no token dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.layers import Linear, activate


class MixtureOfExperts(nn.Module):
    """The sum of the K chosen experts' outputs, weighted by the router. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.router = Linear(D, E)
        self.gate_up = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down = nn.Parameter(torch.empty(E, D, width))
        self.experts = E
        self.chosen = config.num_experts_per_tok
        self.normalized = config.norm_topk_prob
        self.activation = config.hidden_activation

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, D)
        weights, experts = self.route(rows)  # (N, K) each
        order = experts.flatten().argsort(stable=True)  # pairs of token and expert, by expert
        token = order // self.chosen
        ends = F.one_hot(experts.flatten(), self.experts).sum(0).cumsum(0).to(torch.int32)

        hidden = F.grouped_mm(rows[token], self.gate_up.to(x.dtype).transpose(1, 2), offs=ends)
        gate, up = hidden.chunk(2, dim=-1)
        hidden = activate(self.activation, gate) * up
        out = F.grouped_mm(hidden, self.down.to(x.dtype).transpose(1, 2), offs=ends)  # (N·K, D)

        out = out * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(rows).index_add(0, token, out).view_as(x)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's K experts and their weights, from a softmax over all E in float32."""
        probabilities = self.router(rows).float().softmax(-1)
        weights, experts = probabilities.topk(self.chosen, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(rows.dtype), experts
