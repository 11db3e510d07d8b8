"""Cross entropy over a large vocabulary, without storing all logits.

The logits of 8 × 1024 tokens over 262,144 words are 8.6 GB in float32, and their gradient is as
large. The chunked loss takes some tokens at a time through head, softmax and back. Gradients are
computed in the forward pass, so nothing is stored for later and nothing is computed twice.

    for each chunk of tokens:  logits = h Wᵀ        loss += Σ (log Σ exp logits − logits[target])
                               g = softmax − onehot    dh = g W      dW += gᵀ h

g overwrites the logits, in their type. One function computes it, `softmax_`, which torch.compile
turns into one kernel. On a CPU it gets a few rows at a time: it keeps their exponentials in
float32, which for a whole chunk would be twice the memory of the logits, while those of a few rows
stay in the cache. dW is accumulated in float32, a slice of the vocabulary at a time, so that the
product to add is still in the cache too.

Targets of −100 are ignored. With a z-loss, z · (log Σ exp logits)² of each token is added, which
keeps the logits from drifting (Chowdhery et al. 2022, section 5). The softmax in g is then
multiplied by 1 + 2 z · log Σ exp logits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_cli.model.counting import CHUNK_ELEMENTS, SOFTMAX_ELEMENTS
from pretrain_cli.targets import IGNORE_INDEX

SLICE_ELEMENTS = 2**21
"""Elements of the V × D gradient accumulated at a time on a CPU: 4 MB in bfloat16."""


Softmax = Callable[[Tensor, Tensor, float], Tensor]
"""`softmax_`, plain or compiled."""


class Loss(NamedTuple):
    """Float32 scalars. Only the first has gradients; it is the sum of the others."""

    minimized: Tensor
    cross_entropy: Tensor
    z_loss: Tensor


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    normalizer: float | None,
    chunked: bool,
    softmax: Softmax | None = None,
    waiting: list[Tensor] | None = None,
) -> Tensor:
    """Return the summed cross entropy divided by `normalizer`, in float32: the mean if that is the
    target count.

    hidden (B, T, D) in the compute type, weight (V, D), targets (B, T). A micro-step passes the
    target count of its whole step, so that the micro-steps add up to the step's mean; None counts
    the targets given here. With `waiting`, the backward pass of the chunked loss leaves the
    gradient of `weight` there for a `lookup`, and gives autograd none.
    """
    return with_z_loss(
        hidden,
        weight,
        targets,
        normalizer=normalizer,
        chunked=chunked,
        z_loss=0.0,
        softmax=softmax,
        waiting=waiting,
    ).minimized


def with_z_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    normalizer: float | None,
    chunked: bool,
    z_loss: float,
    softmax: Softmax | None = None,
    waiting: list[Tensor] | None = None,
) -> Loss:
    """Return cross entropy and z-loss; `z_loss` is its coefficient."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    count: Tensor | float = normalizer or (targets != IGNORE_INDEX).sum().clamp(min=1)
    if chunked and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        scale = 1.0 / count
        softmax = softmax or softmax_
        return Loss(
            *_LinearCrossEntropy.apply(hidden, weight, targets, scale, z_loss, softmax, waiting)
        )
    rows = _chunk_rows(hidden, weight) if chunked else max(1, len(hidden))
    weight = weight.to(hidden.dtype)
    entropy = torch.zeros((), device=hidden.device)
    z_term = torch.zeros((), device=hidden.device)
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = F.linear(h, weight).float()
        entropy = entropy + F.cross_entropy(logits, t, ignore_index=IGNORE_INDEX, reduction="sum")
        if z_loss:
            z_term = z_term + z_loss * (logits.logsumexp(-1).square() * (t != IGNORE_INDEX)).sum()
    entropy, z_term = entropy / count, z_term / count
    return Loss(entropy + z_term, entropy.detach(), z_term.detach())


def _chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"])
    return max(1, elements // weight.shape[0])


def softmax_(logits: Tensor, share: Tensor, z_loss: float) -> Tensor:
    """Replace logits by each row's softmax times the row's gradient scale: the gradient, except for
    the target. (rows, V), (rows, 1) -> log Σ exp, (rows, 1) in float32."""
    wide = logits.float()
    largest = wide.amax(-1, keepdim=True)
    wide = wide.sub_(largest).exp_()
    total = wide.sum(-1, keepdim=True)
    log_sum = largest + total.log()
    logits.copy_(wide.mul_(share * (1 + 2 * z_loss * log_sum) / total))
    return log_sum


def _by_rows(softmax: Softmax, logits: Tensor, share: Tensor, z_loss: float) -> Tensor:
    """Apply `softmax` to logits, on a CPU a few rows at a time. -> log Σ exp, (rows, 1)."""
    if logits.device.type != "cpu":
        return softmax(logits, share, z_loss)
    rows = _power_of_two(SOFTMAX_ELEMENTS // logits.shape[1])
    spans = zip(logits.split(rows), share.split(rows), strict=True)
    return torch.cat([softmax(*span, z_loss) for span in spans])


def _power_of_two(count: int) -> int:
    """Return the largest power of two up to `count`, at least 1. Matrix products with such a number
    of rows are fast."""
    return 1 << max(0, count.bit_length() - 1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ (cross entropy + z-loss) · scale, with both gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor | float,
        z_loss: float,
        softmax: Softmax,
        waiting: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Allocate the largest buffer first: it then reuses its memory of the previous step.
        d_weight = torch.empty(weight.shape, device=weight.device, dtype=torch.float32)
        w = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        entropy = torch.zeros((), device=hidden.device)
        z_term = torch.zeros((), device=hidden.device)
        rows = _chunk_rows(hidden, weight)
        chunk = hidden.new_empty(min(rows, len(hidden)), len(w))
        parts = zip(*(x.split(rows) for x in (hidden, targets, d_hidden)), strict=True)
        for number, (h, t, dh) in enumerate(parts):
            share = (t != IGNORE_INDEX).unsqueeze(-1) * scale  # token weight; 0 if ignored
            t = t.clamp(min=0).unsqueeze(-1)
            logits = torch.mm(h, w.t(), out=chunk[: len(h)])  # (rows, V)
            target_logits = logits.gather(-1, t).float()
            log_sum = _by_rows(softmax, logits, share, z_loss)
            entropy += ((log_sum - target_logits) * share).sum()
            z_term += z_loss * (log_sum.square() * share).sum()
            probability = (target_logits - log_sum).exp()
            target_gradients = share * (probability * (1 + 2 * z_loss * log_sum) - 1)
            row = torch.arange(len(h), device=h.device)  # on CPUs scatter_ copies all logits
            logits[row, t.squeeze(-1)] = target_gradients.squeeze(-1).to(logits.dtype)
            torch.mm(logits, w, out=dh)
            _add_product(d_weight, logits.t(), h, first=number == 0)
        ctx.gradients, ctx.waiting = (d_hidden, d_weight.to(weight.dtype)), waiting
        ctx.mark_non_differentiable(entropy, z_term)
        return entropy + z_term, entropy, z_term

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a loss is taken backward once: its gradients are given away")
        outer, (d_hidden, d_weight) = grad_outputs[0], ctx.gradients
        ctx.gradients = None  # autograd copies gradients that are referenced elsewhere
        # Training passes 1. On a CPU, reading `outer` is free, and scaling by 1 would allocate a
        # second V × D tensor, which costs more than the product. On a GPU, reading costs more.
        if outer.device.type != "cpu" or outer != 1:
            d_hidden, d_weight = (x * outer.to(x.dtype) for x in (d_hidden, d_weight))
        if ctx.waiting is not None:
            ctx.waiting.append(d_weight)
            return d_hidden, *[None] * 6
        return d_hidden, d_weight, *[None] * 5


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Compute total += a @ b, or with `first` total = a @ b. `total` may have a wider type."""
    on_cpu = total.device.type == "cpu"
    rows = _power_of_two(SLICE_ELEMENTS // total.shape[1]) if on_cpu else len(total)
    for span, a_rows in zip(total.split(rows), a.split(rows), strict=True):
        if total.dtype == a.dtype:
            torch.addmm(span, a_rows, b, beta=0 if first else 1, out=span)
        elif first:
            span.copy_(a_rows @ b)
        else:
            span.add_(a_rows @ b)
