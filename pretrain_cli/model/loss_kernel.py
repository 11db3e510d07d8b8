"""One kernel for the softmax of a row of logits and its gradient, for GPUs.

    x (rows, V), in its own type ──> g = (softmax(x) · (1 + 2 z · lse) − onehot) · share, in place
                                └──> lse = log Σ exp x, and x[target], float32

A program reads its row twice and writes it once. The first pass keeps a running maximum and sum in
float32, the second writes. The product of both matrices around it stays with cuBLAS. Rows without a
share cost one write. `loss.gradient_` computes the same in PyTorch.
"""

import torch

# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
"""Maximum number of logits that a program holds at a time: 16 for each of 512 threads."""


@triton.jit
def _gradient(
    logits,
    targets,
    shares,
    log_sums,
    target_logits,
    stride,
    V,
    z_loss,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows · V can exceed 2^31
    logits += row * stride
    share = tl.load(shares + row)
    columns = tl.arange(0, BLOCK)
    if share == 0:
        if WRITE:
            for start in range(0, V, BLOCK):
                tl.store(logits + start + columns, 0.0, mask=start + columns < V)
        tl.store(log_sums + row, 0.0)
        tl.store(target_logits + row, 0.0)
    else:
        target = tl.load(targets + row)
        # A target outside the vocabulary makes the loss NaN; it never reads another row.
        inside = (target >= 0) & (target < V)
        target_logit = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
        largest = float("-inf")
        total = 0.0
        for start in range(0, V, BLOCK):
            x = tl.load(logits + start + columns, mask=start + columns < V, other=float("-inf"))
            x = x.to(tl.float32)
            before = largest
            largest = tl.maximum(before, tl.max(x, 0))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)
        log_sum = largest + tl.log(total)
        tl.store(log_sums + row, log_sum)
        tl.store(target_logits + row, target_logit)
        if WRITE:
            factor = share * (1 + 2 * z_loss * log_sum)
            for start in range(0, V, BLOCK):
                place = start + columns
                x = tl.load(logits + place, mask=place < V, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - log_sum) * factor - tl.where(place == target, share, 0.0)
                tl.store(logits + place, gradient, mask=place < V)  # in the logits' type


def gradient_(
    logits: Tensor, targets: Tensor, share: Tensor, z_loss: float, *, write: bool = True
) -> tuple[Tensor, Tensor]:
    """Replace logits by the gradient; see `loss.gradient_`. Without `write` they stay.

    Both results are 0 in rows without a share.
    """
    assert logits.stride(1) == 1
    rows, V = logits.shape
    log_sum, target_logit = (
        torch.empty(rows, device=logits.device, dtype=torch.float32) for _ in range(2)
    )
    block = min(BLOCK, triton.next_power_of_2(V))
    _gradient[(rows,)](
        logits,
        targets,
        share,
        log_sum,
        target_logit,
        logits.stride(0),
        V,
        z_loss,
        WRITE=write,
        BLOCK=block,
        num_warps=max(1, block // 512),
    )
    return log_sum, target_logit
