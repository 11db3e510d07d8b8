"""Muon: the update of a hidden matrix is the orthogonal matrix nearest to its momentum.

The method is Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the update scale of Liu
et al. 2025 (arXiv 2502.16982): updates have a root mean square of 0.2, about AdamW's, so both share
one learning rate and weight decay. The arithmetic equals torch.optim.Muon's with adjust_lr_fn
"match_rms_adamw"; the tests compare the two. This implementation exists because torch.optim.Muon

- treats each parameter as one matrix. Ours hold several: q, k, v; gate, up; one per expert. Here
  each matrix is orthogonalized separately, as if it were stored alone;
- processes one matrix at a time. An expert's three matrices are small, and a model has thousands.
  Here all experts of a layer are stacked and go through each product together;
- has no `found_inf`, which skips a step without a host sync, as in fused AdamW.

Muon keeps one state tensor for each parameter; AdamW keeps two. A step costs at most
30·rows·columns·min(rows, columns) FLOPs a matrix, whatever the number of tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial; steep at zero, so that small singular values grow fast.
"""
ITERATIONS = 5
TINY = 1e-7


class Muon(Optimizer):
    """Muon for parameter groups. A group's `blocks` lists, for each of its parameters, the row
    slices that are separate matrices.

    Parameters are (..., rows, columns); leading dimensions are stacks of matrices.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, momentum: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter, blocks in zip(group["params"], group["blocks"], strict=True):
                if parameter.grad is None:
                    continue
                whole = parameter, parameter.grad, self.state[parameter]["momentum_buffer"]
                for rows in blocks:
                    weight, grad, buffer = (tensor[..., rows, :] for tensor in whole)
                    self._step_block(weight, grad, buffer, group)

    def _step_block(
        self, weight: Tensor, grad: Tensor, buffer: Tensor, group: dict[str, Any]
    ) -> None:
        rate, momentum = group["lr"], group["momentum"]
        mean = buffer.lerp(grad, 1 - momentum)
        update = orthogonalize(grad.lerp(mean, momentum))  # Nesterov momentum
        size = rate * 0.2 * math.sqrt(max(weight.shape[-2:]))
        stepped = (weight * (1 - rate * group["weight_decay"])).add_(update, alpha=-size)
        if self.found_inf is not None:
            mean = torch.where(self.found_inf > 0, buffer, mean)
            stepped = torch.where(self.found_inf > 0, weight, stepped)
        buffer.copy_(mean)
        weight.copy_(stepped)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return approximately U V^T for each matrix U S V^T, shape (..., rows, columns), in bfloat16.

    Newton-Schulz iteration: a polynomial in X X^T, so it needs matrix products only. The resulting
    singular values lie between about 0.7 and 1.2, which works as well as exactly 1.
    """
    a, b, c = COEFFICIENTS
    shape = matrices.shape
    x = matrices.reshape(-1, *shape[-2:]).bfloat16()
    is_tall = shape[-2] > shape[-1]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(shape)


class WithAdamW(Optimizer):
    """An optimizer of matrices, such as Muon, and AdamW as one, each for its own parameters. They
    share the list of groups and the state.

    `_step_supports_amp_scaling` is PyTorch's flag for an optimizer that honours `found_inf`. AdamW
    does so only if it is fused, and the other one if it has the attribute.
    """

    def __init__(self, matrices: Optimizer, adamw: AdamW) -> None:
        super().__init__([*matrices.param_groups, *adamw.param_groups], adamw.defaults)
        self.parts = matrices, adamw
        matrices.state = adamw.state = self.state
        self.found_inf: Tensor | None = None
        honours = bool(adamw.defaults["fused"]) and hasattr(matrices, "found_inf")
        self._step_supports_amp_scaling = honours

    def step(self, closure: Any = None) -> Any:
        for part in self.parts:
            part.found_inf = self.found_inf  # pyright: ignore[reportAttributeAccessIssue]
            part.step()
