"""Mixture of experts, as in Qwen 3: each token goes to its best K of E small gated MLPs.

The experts' matrices are stacked and multiplied with `grouped_mm`: tokens are sorted by expert, so
each expert gets one contiguous range of rows. There is no loop over experts, no host
synchronization, no capacity limit and no dropped token.

An auxiliary loss balances the experts, as published (Fedus et al. 2021, equations 4 to 6, over all
sparse layers together): E · Σ_e f_e P_e, where f_e is the number of choices of expert e per token
and P_e its mean probability. Even use gives K. Gradients flow through P only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.layers import Linear, activate


class MixtureOfExperts(nn.Module):
    """Sum of the K chosen experts' outputs, weighted by the router. (B, T, D) -> (B, T, D).

    With `counted` (B, T), True for tokens that count, also returns the expert use by those tokens,
    (2, E): how often each was chosen, and the sum of its probabilities.
    """

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

    def forward(self, x: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        rows = x.reshape(-1, x.shape[-1])  # (N, D)
        probabilities = self.router(rows).float().softmax(-1)  # (N, E)
        weights, experts = self.choose(probabilities)  # (N, K) each
        order = experts.flatten().argsort(stable=True)  # (token, expert) pairs sorted by expert
        inverse = order.argsort()
        ends = F.one_hot(experts.flatten(), self.experts).sum(0).cumsum(0).to(torch.int32)

        hidden = F.grouped_mm(
            gather(rows, order, inverse, self.chosen),
            self.gate_up.to(x.dtype).transpose(1, 2),
            offs=ends,
        )
        gate, up = hidden.chunk(2, dim=-1)
        hidden = activate(self.activation, gate) * up
        out = F.grouped_mm(hidden, self.down.to(x.dtype).transpose(1, 2), offs=ends)  # (N·K, D)

        out = out * weights.to(x.dtype).flatten()[order].unsqueeze(-1)
        out = permute(out, inverse, order).view(len(rows), self.chosen, -1)
        out = out.sum(1, dtype=torch.float32).to(x.dtype).view_as(x)
        return out, None if counted is None else _use(probabilities, experts, counted.flatten())

    def choose(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's K experts and their weights, from its float32 probabilities of all
        E."""
        weights, experts = probabilities.topk(self.chosen, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts


def gather(rows: Tensor, order: Tensor, inverse: Tensor, chosen: int) -> Tensor:
    """Return each token's row once for each of its experts, sorted by expert. (N, D) -> (N·K, D).

    `order` sorts the N·K pairs, token by token, by expert; `inverse` undoes it. The gradient of a
    row is the float32 sum of its K rows' gradients. Autograd's own would sort, and on a GPU add
    atomically, in an order that changes from run to run.
    """
    out: Tensor = _Gather.apply(rows, order, inverse, chosen)
    return out


def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return `rows[order]`. Its gradient is permuted by `inverse`, without a sum. (N·K, D) -> (N·K,
    D)."""
    out: Tensor = _Permute.apply(rows, order, inverse)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, chosen: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.chosen = chosen
        return rows[order // chosen]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,), grad = ctx.saved_tensors, grad_outputs[0]
        rows = grad[inverse].unflatten(0, (-1, ctx.chosen))
        return rows.sum(1, dtype=torch.float32).to(grad.dtype), None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad_outputs[0][inverse], None, None


def _use(probabilities: Tensor, experts: Tensor, counted: Tensor) -> Tensor:
    """Return the expert use of tokens. (N, E), (N, K), (N,) -> (2, E)."""
    each = counted.float()
    chosen = torch.zeros_like(probabilities[0])
    chosen = chosen.scatter_add(0, experts.flatten(), each.repeat_interleave(experts.shape[1]))
    return torch.stack([chosen, (probabilities * each.unsqueeze(-1)).sum(0)])


def balancing_loss(use: Tensor, counted: Tensor) -> Tensor:
    """Return the balancing loss, a scalar, from the expert use of each sparse layer, (layers, 2,
    E), and the number of tokens."""
    layers, _, experts = use.shape
    chosen, probability = use.sum(0) / (layers * counted.sum().clamp(min=1))
    return experts * (chosen.detach() * probability).sum()
