"""Cross entropy over a large vocabulary, without the logits.

The logits of 8 × 1024 tokens over 262,144 words are 8.6 GB in float32; their gradient is as large.
Chunked, some of the tokens at a time are taken through head, softmax and back: their gradients
are formed on the way, in the forward pass, so nothing is kept and nothing is computed twice.

    for each chunk of tokens:  logits = h Wᵀ        loss += Σ (log Σ exp logits − logits[target])
                               g = softmax − onehot    dh = g W      dW += gᵀ h

g takes the logits' place, in their type. It is made by one function, `softmax_`, which
torch.compile makes one kernel of. On a CPU it is given a few rows at a time: it keeps their
exponentials in float32, which for a whole chunk would be twice the logits' memory, and of a few
rows stay in the cache. dW is summed in float32, a slice of the vocabulary at a time, so that the
product to be added is still there, too.

Targets of −100 are not counted. With a z-loss, z · (log Σ exp logits)² of each token is minimized
as well, which keeps the logits from drifting away together (Chowdhery et al. 2022, section 5): the
softmax in g is then times 1 + 2 z · log Σ exp logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_cli.model.counting import CHUNK_ELEMENTS, SOFTMAX_ELEMENTS

IGNORE_INDEX = -100
SLICE_ELEMENTS = 2**21
"""Elements of the V × D gradient that are added up at a time on a CPU: 4 MB in bfloat16."""


Softmax = Callable[[Tensor, Tensor, float], Tensor]
"""`softmax_`, or that compiled."""


class Loss(NamedTuple):
    """Scalars in float32. Gradients flow from the first alone, the sum of the others."""

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
    """Summed cross entropy over `normalizer`, in float32: the mean where that is the target count.

    hidden (B, T, D) in the compute type, weight (V, D), targets (B, T). A step that is made of
    several micro-steps passes the whole step's count, so that its parts add up to its mean; None
    means the targets given here. With `waiting`, the chunked loss leaves weight's gradient there in
    its backward pass, for a `lookup` to take, and gives autograd none.
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
    """The same with the z-loss, `z_loss` its coefficient."""
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
    """Make of logits, in their place, the share of each row's softmax that is their gradient but
    for the target. (rows, V), (rows, 1) -> log Σ exp, (rows, 1) in float32."""
    wide = logits.float()
    largest = wide.amax(-1, keepdim=True)
    wide = wide.sub_(largest).exp_()
    total = wide.sum(-1, keepdim=True)
    log_sum = largest + total.log()
    logits.copy_(wide.mul_(share * (1 + 2 * z_loss * log_sum) / total))
    return log_sum


def _by_rows(softmax: Softmax, logits: Tensor, share: Tensor, z_loss: float) -> Tensor:
    """`softmax` of logits, on a CPU a few rows at a time. -> log Σ exp, (rows, 1)."""
    if logits.device.type != "cpu":
        return softmax(logits, share, z_loss)
    rows = _power_of_two(SOFTMAX_ELEMENTS // logits.shape[1])
    parts = zip(logits.split(rows), share.split(rows), strict=True)
    return torch.cat([softmax(part, of_part, z_loss) for part, of_part in parts])


def _power_of_two(count: int) -> int:
    """The last up to `count`, or 1: chunks are of even numbers of rows, and products of matrices
    with such a number of rows fast."""
    return 1 << max(0, count.bit_length() - 1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ (cross entropy + z-loss) · scale, with both gradients formed in the forward pass."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor | float,
        z_loss: float,
        softmax: Softmax,
        waiting: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # the largest first, which finds its place of the step before
        d_weight = torch.empty(weight.shape, device=weight.device, dtype=torch.float32)
        w = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        entropy = torch.zeros((), device=hidden.device)
        z_term = torch.zeros((), device=hidden.device)
        rows = _chunk_rows(hidden, weight)
        chunk = hidden.new_empty(min(rows, len(hidden)), len(w))
        parts = zip(*(x.split(rows) for x in (hidden, targets, d_hidden)), strict=True)
        for number, (h, t, dh) in enumerate(parts):
            share = (t != IGNORE_INDEX).unsqueeze(-1) * scale  # of the loss: 0 for an ignored token
            t = t.clamp(min=0).unsqueeze(-1)
            logits = torch.mm(h, w.t(), out=chunk[: len(h)])  # (rows, V)
            of_target = logits.gather(-1, t).float()
            log_sum = _by_rows(softmax, logits, share, z_loss)
            entropy += ((log_sum - of_target) * share).sum()
            z_term += z_loss * (log_sum.square() * share).sum()
            probability = (of_target - log_sum).exp()
            of_target = share * (probability * (1 + 2 * z_loss * log_sum) - 1)
            row = torch.arange(len(h), device=h.device)  # on a CPU scatter_ copies all logits first
            logits[row, t.squeeze(-1)] = of_target.squeeze(-1).to(logits.dtype)
            torch.mm(logits, w, out=dh)
            _add_product(d_weight, logits.t(), h, first=number == 0)
        ctx.gradients, ctx.waiting = (d_hidden, d_weight.to(weight.dtype)), waiting
        ctx.mark_non_differentiable(entropy, z_term)
        return entropy + z_term, entropy, z_term

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("a loss is taken backward once: its gradients are given away")
        outer, (d_hidden, d_weight) = grad_outputs[0], ctx.gradients
        ctx.gradients = None  # held by none but autograd, they are not copied
        # Training passes 1. On a CPU a second V × D tensor would cost more than the product, and
        # looking at a number is free; on a GPU it is the other way round.
        if outer.device.type != "cpu" or outer != 1:
            d_hidden, d_weight = (x * outer.to(x.dtype) for x in (d_hidden, d_weight))
        if ctx.waiting is not None:
            ctx.waiting.append(d_weight)
            return d_hidden, *[None] * 6
        return d_hidden, d_weight, *[None] * 5


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, or with `first` total = a @ b; total may be of a wider type."""
    on_cpu = total.device.type == "cpu"
    rows = _power_of_two(SLICE_ELEMENTS // total.shape[1]) if on_cpu else len(total)
    for part, of_a in zip(total.split(rows), a.split(rows), strict=True):
        if total.dtype == a.dtype:
            torch.addmm(part, of_a, b, beta=0 if first else 1, out=part)
        elif first:
            part.copy_(of_a @ b)
        else:
            part.add_(of_a @ b)
