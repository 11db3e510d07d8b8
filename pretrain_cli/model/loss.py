"""Cross entropy over a large vocabulary, without storing all logits.

The logits of 8 × 1024 tokens over 262,144 words are 8.6 GB in float32, and their gradient is as
large. The chunked loss takes some tokens at a time through head, softmax and back. Gradients are
computed in the forward pass, so nothing is stored for later and nothing is computed twice.

    for each chunk of tokens:  logits = h Wᵀ        loss += Σ (log Σ exp logits − logits[target])
                               g = softmax − onehot    dh = g W      dW += gᵀ h

g overwrites the logits, in their type. dW is accumulated in float32.

On a CPU, `softmax_` gets a few rows at a time: it keeps their exponentials in float32, which for a
whole chunk would be twice the memory of the logits, while those of a few rows stay in the cache.
dW is accumulated a slice of the vocabulary at a time, so that the product to add is still in the
cache too. On a GPU, one kernel makes g (`loss_kernel`), cuBLAS adds its product to the float32 dW,
and all chunks have one size (`loss_chunks`).

Targets of −100 are ignored. With a z-loss, z · (log Σ exp logits)² of each token is added, which
keeps the logits from drifting (Chowdhery et al. 2022, section 5). The softmax in g is then
multiplied by 1 + 2 z · log Σ exp logits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_cli.compilers import no_triton
from pretrain_cli.model.counting import SOFTMAX_ELEMENTS, LossChunk, loss_chunks
from pretrain_cli.model.loss_backends import LOSS_BACKENDS
from pretrain_cli.targets import IGNORE_INDEX

SLICE_ELEMENTS = 2**21
"""Elements of the V × D gradient accumulated at a time on a CPU: 4 MB in bfloat16."""


Softmax = Callable[[Tensor, Tensor, float], Tensor]
"""`softmax_`, plain or compiled."""
Gradient = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""`gradient_`, in PyTorch or in one kernel."""


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
    chunked: bool | str,
    softmax: Softmax | None = None,
    waiting: list[Tensor] | None = None,
) -> Tensor:
    """Return the summed cross entropy divided by `normalizer`, in float32: the mean if that is the
    target count.

    hidden (B, T, D) in the compute type, weight (V, D), targets (B, T). A micro-step passes the
    target count of its whole step, so that the micro-steps add up to the step's mean; None counts
    the targets given here. With `waiting`, the backward pass of the chunked loss leaves the
    gradient of `weight` there for a `lookup`, and gives autograd none. `chunked` may also name one
    of LOSS_BACKENDS, which computes the loss if it has gradients.
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
    chunked: bool | str,
    z_loss: float,
    softmax: Softmax | None = None,
    waiting: list[Tensor] | None = None,
) -> Loss:
    """Return cross entropy and z-loss; `z_loss` is its coefficient."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    count: Tensor | float = normalizer or (targets != IGNORE_INDEX).sum().clamp(min=1)
    has_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if has_gradients and isinstance(chunked, str):
        assert not z_loss, f"{chunked} has no z-loss"
        summed = LOSS_BACKENDS[chunked].summed(hidden, weight.to(hidden.dtype), targets)
        entropy = summed.float() / count
        return Loss(entropy, entropy.detach(), torch.zeros_like(entropy))
    chunks = [LossChunk(0, len(hidden), 0)]
    if chunked:
        chunks = loss_chunks(len(hidden), len(weight), hidden.device.type)
    if has_gradients and chunked:
        shares = (targets != IGNORE_INDEX) * (1.0 / count)
        gradient = _kernel(hidden.device.type) or functools.partial(
            gradient_, softmax=softmax or softmax_
        )
        return Loss(
            *_LinearCrossEntropy.apply(
                hidden, weight, targets, shares, z_loss, chunks, gradient, waiting
            )
        )
    weight = weight.to(hidden.dtype)
    kernel = _kernel(hidden.device.type) if chunked else None
    entropy = torch.zeros((), device=hidden.device)
    z_term = torch.zeros((), device=hidden.device)
    for start, stop, repeated in chunks:
        h, t = hidden[start + repeated : stop], targets[start + repeated : stop]
        logits = F.linear(h, weight)
        if kernel:
            log_sum, target_logits = kernel(
                logits, t, (t != IGNORE_INDEX).float(), 0.0, write=False
            )
            entropy = entropy + (log_sum - target_logits).sum()
        else:
            logits = logits.float()
            entropy = entropy + F.cross_entropy(
                logits, t, ignore_index=IGNORE_INDEX, reduction="sum"
            )
            log_sum = logits.logsumexp(-1) if z_loss else logits
        if z_loss:
            z_term = z_term + z_loss * (log_sum.square() * (t != IGNORE_INDEX)).sum()
        del logits, log_sum  # or the next chunk's would be beside them
    entropy, z_term = entropy / count, z_term / count
    return Loss(entropy + z_term, entropy.detach(), z_term.detach())


@functools.cache
def _kernel(device_type: str) -> Any:
    """Return the kernel that computes `gradient_` on a GPU; None without one."""
    if device_type != "cuda" or no_triton():
        return None
    from pretrain_cli.model.loss_kernel import gradient_

    return gradient_


def gradient_(
    logits: Tensor, targets: Tensor, share: Tensor, z_loss: float, *, softmax: Softmax
) -> tuple[Tensor, Tensor]:
    """Replace logits by their gradient, (softmax · (1 + 2 z · log Σ exp) − onehot) · share.

    (rows, V), (rows,), (rows,) -> log Σ exp and the target's logit, (rows,) in float32. Ignored
    targets have the share 0, and any values here.
    """
    share, t = share.unsqueeze(-1), targets.clamp(min=0).unsqueeze(-1)
    target_logits = logits.gather(-1, t).float()
    log_sum = _by_rows(softmax, logits, share, z_loss)
    probability = (target_logits - log_sum).exp()
    target_gradients = share * (probability * (1 + 2 * z_loss * log_sum) - 1)
    row = torch.arange(len(logits), device=logits.device)  # on CPUs scatter_ copies all logits
    logits[row, t.squeeze(-1)] = target_gradients.squeeze(-1).to(logits.dtype)
    return log_sum.squeeze(-1), target_logits.squeeze(-1)


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
    """Σ (cross entropy + z-loss) · share, with both gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        shares: Tensor,
        z_loss: float,
        chunks: list[LossChunk],
        gradient: Gradient,
        waiting: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Allocate the largest buffer first: it then reuses its memory of the previous step.
        d_weight = torch.empty(weight.shape, device=weight.device, dtype=torch.float32)
        w = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        entropy = torch.zeros((), device=hidden.device)
        z_term = torch.zeros((), device=hidden.device)
        buffer = hidden.new_empty(chunks[0].stop - chunks[0].start, len(w))
        for number, (start, stop, repeated) in enumerate(chunks):
            h, share = hidden[start:stop], shares[start:stop]
            if repeated:
                share = share.clone()
                share[:repeated] = 0
            logits = torch.mm(h, w.t(), out=buffer[: len(h)])  # (rows, V)
            log_sum, target_logits = gradient(logits, targets[start:stop], share, z_loss)
            entropy += ((log_sum - target_logits) * share).sum()
            if z_loss:
                z_term += z_loss * (log_sum.square() * share).sum()
            torch.mm(logits, w, out=d_hidden[start:stop])
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
        if not _is_one(outer):
            d_hidden.mul_(outer)
            d_weight.mul_(outer)
        if ctx.waiting is not None:
            ctx.waiting.append(d_weight)
            return d_hidden, *[None] * 7
        return d_hidden, d_weight, *[None] * 6


@functools.cache
def unit_gradient(device: torch.device) -> Tensor:
    """Return the gradient 1, for `loss.backward(unit_gradient(device))`.

    It is what `loss.backward()` takes by itself. But this tensor is known to be 1 without a look at
    its value, for which a GPU would have to be waited for: the V × D gradient isn't multiplied.
    """
    return torch.ones((), device=device)


def _is_one(outer: Tensor) -> bool:
    """Return whether a gradient is known to be 1. On a CPU a look at its value is free."""
    known = outer.data_ptr() == unit_gradient(outer.device).data_ptr()
    return known or (outer.device.type == "cpu" and bool(outer == 1))


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Compute total += a @ b, or with `first` total = a @ b. `total` may have a wider type."""
    if total.dtype != a.dtype and _sums_in_float32(total.device):
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    on_cpu = total.device.type == "cpu"
    rows = _power_of_two(SLICE_ELEMENTS // total.shape[1]) if on_cpu else len(total)
    for span, a_rows in zip(total.split(rows), a.split(rows), strict=True):
        if total.dtype == a.dtype:
            torch.addmm(span, a_rows, b, beta=0 if first else 1, out=span)
        elif first:
            span.copy_(a_rows @ b)
        else:
            span.add_(a_rows @ b)


def _sums_in_float32(device: torch.device) -> bool:
    """Return whether the device's products of bfloat16 can be added to a float32 tensor."""
    is_nvidia = device.type == "cuda" and not torch.version.hip
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)
