"""Cross entropy over a large vocabulary, without the logits.

The logits of 8 × 1024 tokens over 262,144 words are 8.6 GB in float32; their gradient is as large.
Chunked, some of the tokens at a time are taken through head, softmax and back: their gradients
are formed on the way, in the forward pass, so nothing is kept and nothing is computed twice.

    for each chunk of tokens:  logits = h Wᵀ        loss += Σ (log Σ exp logits − logits[target])
                               g = softmax − onehot    dh = g W      dW += gᵀ h

Targets of −100 are not counted.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
CHUNK_ELEMENTS = {"cpu": 2**27, "cuda": 2**30}
"""Logits held at a time. Fewer cost more passes over the V × D gradient, more cost memory."""


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, normalizer: float | None, chunked: bool
) -> Tensor:
    """Summed cross entropy over `normalizer`, in float32: the mean where that is the target count.

    hidden (B, T, D) in the compute type, weight (V, D), targets (B, T). A step that is made of
    several micro-steps passes the whole step's count, so that its parts add up to its mean; None
    means the targets given here.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    count: Tensor | float = normalizer or (targets != IGNORED).sum().clamp(min=1)
    if not chunked:
        logits = F.linear(hidden, weight.to(hidden.dtype)).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / count
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total = _LinearCrossEntropy.apply(hidden, weight, targets, 1.0 / count)
        assert isinstance(total, Tensor)
        return total
    return _chunked_loss(hidden, weight, targets) / count


def _chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"])
    return max(1, elements // weight.shape[0])


def _chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed loss alone."""
    rows = _chunk_rows(hidden, weight)
    weight = weight.to(hidden.dtype)
    total = torch.zeros((), device=hidden.device)
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = F.linear(h, weight).float()
        total += F.cross_entropy(logits, t, ignore_index=IGNORED, reduction="sum")
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ cross entropy · scale, with both gradients formed in the forward pass."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | float
    ) -> Tensor:
        rows = _chunk_rows(hidden, weight)
        w = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, device=weight.device, dtype=torch.float32)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            h, t = hidden[start : start + rows], targets[start : start + rows]
            share = (t != IGNORED).unsqueeze(
                -1
            ) * scale  # of the loss, for each token: 0 if ignored
            t = t.clamp(min=0).unsqueeze(-1)
            logits = F.linear(h, w).float()  # (rows, V)
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += ((log_sum - logits.gather(-1, t)) * share).sum()
            # The logits' memory becomes their gradient's: share · (softmax − onehot), the share
            # taken into the exponent to save a pass.
            grad = logits.sub_(log_sum - share.log()).exp_()
            grad = grad.scatter_add_(-1, t, -share).to(hidden.dtype)
            torch.mm(grad, w, out=d_hidden[start : start + rows])
            if d_weight.dtype == grad.dtype:
                d_weight.addmm_(grad.t(), h)
            else:
                d_weight.add_(grad.t() @ h)
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        (outer,) = grad_outputs
        # Training passes 1. On a CPU a second V × D tensor would cost more than the product, and
        # looking at a number is free; on a GPU it is the other way round.
        if outer.device.type == "cpu" and outer == 1:
            return d_hidden, d_weight, None, None
        return d_hidden * outer.to(d_hidden.dtype), d_weight * outer.to(d_weight.dtype), None, None
