"""Cross entropy over a large vocabulary, without the logits.

The logits of 8 × 1024 tokens over 262,144 words are 8.6 GB in float32; their gradient is as large.
Chunked, some of the tokens at a time are taken through head, softmax and back: their gradients
are formed on the way, in the forward pass, so nothing is kept and nothing is computed twice.

    for each chunk of tokens:  logits = h Wᵀ        loss += Σ (log Σ exp logits − logits[target])
                               g = softmax − onehot    dh = g W      dW += gᵀ h

Targets of −100 are not counted. With a z-loss, z · (log Σ exp logits)² of each token is minimized
as well, which keeps the logits from drifting away together (Chowdhery et al. 2022, section 5): the
softmax in g is then times 1 + 2 z · log Σ exp logits.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
CHUNK_ELEMENTS = {"cpu": 2**27, "cuda": 2**30}
"""Logits held at a time. Fewer cost more passes over the V × D gradient, more cost memory."""


class Loss(NamedTuple):
    """Scalars in float32. Gradients flow from the first alone, the sum of the others."""

    minimized: Tensor
    cross_entropy: Tensor
    z_loss: Tensor


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, normalizer: float | None, chunked: bool
) -> Tensor:
    """Summed cross entropy over `normalizer`, in float32: the mean where that is the target count.

    hidden (B, T, D) in the compute type, weight (V, D), targets (B, T). A step that is made of
    several micro-steps passes the whole step's count, so that its parts add up to its mean; None
    means the targets given here.
    """
    return with_z_loss(
        hidden, weight, targets, normalizer=normalizer, chunked=chunked, z_loss=0.0
    ).minimized


def with_z_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    normalizer: float | None,
    chunked: bool,
    z_loss: float,
) -> Loss:
    """The same with the z-loss, `z_loss` its coefficient."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    count: Tensor | float = normalizer or (targets != IGNORED).sum().clamp(min=1)
    if chunked and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return Loss(*_LinearCrossEntropy.apply(hidden, weight, targets, 1.0 / count, z_loss))
    rows = _chunk_rows(hidden, weight) if chunked else max(1, len(hidden))
    weight = weight.to(hidden.dtype)
    entropy = torch.zeros((), device=hidden.device)
    z_term = torch.zeros((), device=hidden.device)
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = F.linear(h, weight).float()
        entropy = entropy + F.cross_entropy(logits, t, ignore_index=IGNORED, reduction="sum")
        if z_loss:
            z_term = z_term + z_loss * (logits.logsumexp(-1).square() * (t != IGNORED)).sum()
    entropy, z_term = entropy / count, z_term / count
    return Loss(entropy + z_term, entropy.detach(), z_term.detach())


def _chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"])
    return max(1, elements // weight.shape[0])


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ (cross entropy + z-loss) · scale, with both gradients formed in the forward pass."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | float, z_loss: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _chunk_rows(hidden, weight)
        w = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, device=weight.device, dtype=torch.float32)
        entropy = torch.zeros((), device=hidden.device)
        z_term = torch.zeros((), device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            h, t = hidden[start : start + rows], targets[start : start + rows]
            share = (t != IGNORED).unsqueeze(-1) * scale  # of the loss: 0 for an ignored token
            t = t.clamp(min=0).unsqueeze(-1)
            logits = F.linear(h, w).float()  # (rows, V)
            log_sum = logits.logsumexp(-1, keepdim=True)
            entropy += ((log_sum - logits.gather(-1, t)) * share).sum()
            # The logits' memory becomes their gradient's: share · (softmax − onehot), the share
            # taken into the exponent to save a pass.
            grad = logits.sub_(log_sum - share.log()).exp_()
            if z_loss:
                z_term += z_loss * (log_sum.square() * share).sum()
                grad = grad.mul_(1 + 2 * z_loss * log_sum)
            grad = grad.scatter_add_(-1, t, -share).to(hidden.dtype)
            torch.mm(grad, w, out=d_hidden[start : start + rows])
            if d_weight.dtype == grad.dtype:
                d_weight.addmm_(grad.t(), h)
            else:
                d_weight.add_(grad.t() @ h)
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(entropy, z_term)
        return entropy + z_term, entropy, z_term

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        outer = grad_outputs[0]
        # Training passes 1. On a CPU a second V × D tensor would cost more than the product, and
        # looking at a number is free; on a GPU it is the other way round.
        if outer.device.type == "cpu" and outer == 1:
            return d_hidden, d_weight, None, None, None
        scaled = d_hidden * outer.to(d_hidden.dtype), d_weight * outer.to(d_weight.dtype)
        return *scaled, None, None, None
