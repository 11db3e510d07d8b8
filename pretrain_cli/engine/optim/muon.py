"""Muon: the update of a hidden matrix is the orthogonal matrix nearest to its momentum.

The method is Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the update scale of Liu
et al. 2025 (arXiv 2502.16982): updates have a root mean square of 0.2, about AdamW's, so both share
one learning rate and weight decay. The arithmetic equals torch.optim.Muon's with adjust_lr_fn
"match_rms_adamw"; the tests compare the two. This implementation exists because torch.optim.Muon

- treats each parameter as one matrix. Ours hold several: q, k, v; gate, up; one per expert. Here
  each matrix is orthogonalized separately, as if it were stored alone;
- processes one matrix at a time. On a GPU the launches then cost more than the products. Here
  matrices of one shape, of all layers and experts, are stacked and go through each product
  together, and elementwise operations run over lists;
- has no `found_inf`, which skips a step without a host sync, as in fused AdamW.

Muon keeps one state tensor for each parameter, and with NorMuon a number a row; AdamW keeps two.

Newton-Schulz takes 5 · (4 m² n + 2 m³) FLOPs for a matrix of m × n, m ≤ n, whatever the number of
tokens: three products an iteration, with 2 m² n, 2 m³ and 2 m² n. For qwen3-0.6b these are 1.1e13 a
step, 4.3 % of the 2.6e14 of training on 65,536 tokens in sequences of 1,024 (`training_flops` in
model/counting); for gemma3-270m 1.3 %. The share falls as 1 / tokens of a step.
"""

# torch.optim and torch.nn.utils call the same `_foreach_*`; there are no public names.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer


class Iterations(NamedTuple):
    """Iterations that make a matrix orthogonal."""

    coefficients: tuple[tuple[float, float, float], ...]
    """Coefficients (a, b, c) of a X + b (X Xᵀ) X + c (X Xᵀ)² X, for each iteration."""
    margin: float = 1.0
    """The matrix is first divided by this multiple of its Frobenius norm."""


ITERATIONS = {
    "quintic": Iterations(((3.4445, -4.7750, 2.0315),) * 5),
    "polar-express": Iterations(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        margin=1.02,
    ),
}
"""By their name in optimizer.muon_polynomial. Quintic: steep at zero, so that small singular values
grow fast. Polar Express (Amsel et al. 2025, arXiv 2505.16932): each polynomial is the best for what
the ones before leave, provided that no singular value is above 1 after rounding to bfloat16."""
TINY = 1e-7
CHUNK_ELEMENTS = 2**26
"""Maximum number of elements that a step on a GPU processes together, unless one matrix has more.
Its temporary tensors take 10 bytes an element: 0.7 GB, less than a chunk of logits (2 GB), which is
freed by then.

Fewer elements mean more launches, but a full chunk hides them. The experts of 6 layers of
qwen3-30b-a3b, 2,304 matrices of 768 × 2,048 or its transpose, fill 60 chunks in 2,460 launches
(without NorMuon).
Newton-Schulz of one chunk is 1.2e12 FLOPs: 2.4 ms at half of an H100's peak, against 0.25 ms for
its 41 launches of 6 µs."""


class Block(NamedTuple):
    """Matrices of one shape in one parameter: views of shape (matrices, rows, columns)."""

    weight: Tensor
    grad: Tensor
    buffer: Tensor
    row_squares: Tensor | None = None
    """Means of the squares of the updates' rows, (matrices, rows, 1); None without NorMuon."""

    def part(self, rows: slice) -> "Block":
        """Return some of the matrices."""
        squares = None if self.row_squares is None else self.row_squares[rows]
        return Block(self.weight[rows], self.grad[rows], self.buffer[rows], squares)


class Muon(Optimizer):
    """Muon for parameter groups. A group's `blocks` lists, for each of its parameters, the row
    slices that are separate matrices.

    Parameters are (..., rows, columns); leading dimensions are stacks of matrices. `chunk_elements`
    bounds the matrices that are processed together, see `in_chunks`. `dtype` is the type in which
    they are made orthogonal: bfloat16, but float32 on a CPU that emulates bfloat16, where matrices
    of 192 and 512 columns take 15 to 20 times as long in it (one thread of an EPYC).

    Options, each off by default:

    - `scale_rows`: divide each row of the momentum by its norm before it is made orthogonal
      (arXiv 2603.28254).
    - `beta2`: divide each row of the update by the root of a running mean of its squares, then give
      the update its norm back (NorMuon, Li et al. 2025, arXiv 2510.05491).
    - `cautious`: decay a weight only where the update makes it smaller as well (arXiv 2510.12402).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        momentum: float,
        weight_decay: float = 0.0,
        polynomial: str = "quintic",
        scale_rows: bool = False,
        beta2: float = 0.0,
        cautious: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        chunk_elements: int | None = None,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})
        self.iterations = ITERATIONS[polynomial]
        self.scale_rows = scale_rows
        self.beta2 = beta2
        self.cautious = cautious
        self.dtype = dtype
        self.chunk_elements = chunk_elements
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        skip = None if self.found_inf is None else self.found_inf > 0
        for group in self.param_groups:
            for chunk in in_chunks(self._blocks(group), self.chunk_elements):
                self._step_chunk(chunk, group, skip)

    def _blocks(self, group: dict[str, Any]) -> Iterator[Block]:
        for parameter, blocks in zip(group["params"], group["blocks"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            whole = [parameter, parameter.grad, state["momentum_buffer"]]
            if self.beta2:
                whole.append(state["row_squares"])
            for rows in blocks:
                views = (tensor[..., rows, :] for tensor in whole)
                yield Block(*(view if view.ndim > 2 else view.unsqueeze(0) for view in views))

    def _step_chunk(self, chunk: list[Block], group: dict[str, Any], skip: Tensor | None) -> None:
        """Update the matrices of a chunk, all of one shape, unless `skip` is true.

        Operations on lists are `_foreach_*`: on a GPU one launch for many tensors. Temporary
        tensors take at most 10 bytes an element: momenta and updates in float32, and updates in
        bfloat16; then, for the iterations, at most four bfloat16 tensors.
        """
        weights = [block.weight for block in chunk]
        grads, buffers = [block.grad for block in chunk], [block.buffer for block in chunk]
        rate, momentum = group["lr"], group["momentum"]
        sizes, shape = [len(weight) for weight in weights], weights[0].shape[-2:]
        means = torch._foreach_lerp(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, means, momentum)  # Nesterov momentum
        stack = torch.empty(sum(sizes), *shape, dtype=self.dtype, device=weights[0].device)
        torch._foreach_copy_(list(stack.split(sizes)), updates)
        del updates
        _store(means, buffers, skip)
        del means
        if self.scale_rows:
            stack.div_(stack.norm(dim=-1, keepdim=True).clamp_(min=TINY))
        steps = orthogonalize(stack, self.iterations)
        if self.beta2:
            steps = self._normalize_rows(steps, chunk, sizes, skip)
        if skip is not None:
            steps.masked_fill_(skip, 0)
        if len(weights) > 1:  # tensors of one dtype and layout take one launch, others one each
            steps = steps.to(weights[0].dtype, memory_format=torch.contiguous_format)
        parts = list(steps.split(sizes))
        self._decay(weights, parts, rate * group["weight_decay"], skip)
        torch._foreach_add_(weights, parts, alpha=-rate * 0.2 * math.sqrt(max(shape)))

    def _normalize_rows(
        self, steps: Tensor, chunk: list[Block], sizes: list[int], skip: Tensor | None
    ) -> Tensor:
        """Return updates whose rows are divided by the root of their mean squares, with the norm of
        an orthogonal matrix: the root of its smaller side."""
        rows, columns = steps.shape[-2:]
        squares = [block.row_squares for block in chunk if block.row_squares is not None]
        now = steps.float().square().mean(-1, keepdim=True).split(sizes)
        means = torch._foreach_lerp(squares, list(now), 1 - self.beta2)
        steps = steps * torch.cat(means).add(TINY**2).rsqrt_().to(steps.dtype)
        _store(means, squares, skip)
        norms = steps.float().norm(dim=(-2, -1), keepdim=True).clamp_(min=TINY)
        return steps * (math.sqrt(min(rows, columns)) / norms).to(steps.dtype)

    def _decay(
        self, weights: list[Tensor], steps: list[Tensor], amount: float, skip: Tensor | None
    ) -> None:
        """Decay the weights, unless `skip` is true. Cautious: only those that move towards zero;
        a skipped step has no direction."""
        if self.cautious:
            towards_zero = torch._foreach_mul(weights, steps)
            torch._foreach_sign_(towards_zero)
            torch._foreach_clamp_min_(towards_zero, 0)
            torch._foreach_addcmul_(weights, weights, towards_zero, value=-amount)
            return
        factor: Any = 1 - amount
        if skip is not None:
            factor = torch.where(skip, 1.0, factor)
        torch._foreach_mul_(weights, factor)


def in_chunks(blocks: Iterable[Block], elements: int | None) -> Iterator[list[Block]]:
    """Return lists of blocks to process together, each of one matrix shape.

    All but the last of a shape hold as many matrices as fit in `elements` elements, at least one;
    blocks are split where a chunk is full. With None each block is alone: on a CPU a call costs
    little, and the temporary tensors of one block are the fewest.
    """
    if elements is None:
        yield from ([block] for block in blocks)
        return
    alike: dict[torch.Size, list[Block]] = {}
    for block in blocks:
        alike.setdefault(block.weight.shape[-2:], []).append(block)
    for shape, members in alike.items():
        limit = max(1, elements // shape.numel())
        chunk: list[Block] = []
        count = 0
        for block in members:
            start, end = 0, len(block.weight)
            while start < end:
                stop = min(end, start + limit - count)
                chunk.append(block.part(slice(start, stop)))
                start, count = stop, count + stop - start
                if count == limit:
                    yield chunk
                    chunk, count = [], 0
        if chunk:
            yield chunk


def _store(values: Sequence[Tensor], targets: list[Tensor], skip: Tensor | None) -> None:
    """Copy values into targets unless `skip` is true. There is no `_foreach_where`."""
    if skip is None:
        torch._foreach_copy_(targets, list(values))
        return
    for value, target in zip(values, targets, strict=True):
        torch.where(skip, target, value, out=target)


def orthogonalize(x: Tensor, iterations: Iterations = ITERATIONS["quintic"]) -> Tensor:
    """Return approximately U V^T for each matrix U S V^T of a stack, shape (matrices, rows,
    columns). Overwrites the stack.

    Newton-Schulz iteration: a polynomial in X X^T, so it needs matrix products only. The resulting
    singular values lie between about 0.7 and 1.2, which works as well as exactly 1.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x.div_(x.norm(dim=(-2, -1), keepdim=True).mul_(iterations.margin).clamp_(min=TINY))
    for a, b, c in iterations.coefficients:
        # A product of matrices can't overwrite its operands, so `baddbmm` copies the added one.
        # Adding it apart would move as many bytes and round once more.
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if is_tall else x


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
