"""Step guard: skip steps whose loss or gradient norm is not finite or spikes.

    loss, gradient norm ──> finite? no spike? ──> a flag ──> the optimizer steps or leaves all as is

The decision is made on the device, from the same numbers on every rank, so the CPU does not wait:
it reads the outcomes only when a step is logged, on a GPU while the next step runs. A skipped step
still counts as a step of the run, consumes its samples and moves the schedule. Weights, moments and
the optimizer's own step count keep their exact bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.transfer import to_host

MEMORY = 50
"""Steps: a spike is measured against about the last 50, and no spike is detected before step 50."""
NAMES = ("loss", "gradient norm")


@dataclass(frozen=True)
class StepOutcome:
    """Outcome of one step."""

    loss: float
    """Mean over all tokens of the step, on all ranks."""
    gradient_norm: float
    reason: str
    """Reason for skipping the step; empty if it was taken."""
    in_a_row: int
    """Consecutive skipped steps up to this one."""


class StepGuard:
    """Decides on the device whether each step is taken.

    A step is skipped if its loss or gradient norm is not finite or, with `skip_spikes`, lies that
    many standard deviations above the mean. Mean and variance are over the steps taken, weighted by
    0.98^(steps ago); up to the fiftieth all weigh the same. After `max_skips` consecutive skips no
    step is taken until the caller rolls back. The result therefore does not depend on when the
    caller reads the outcomes.
    """

    def __init__(
        self, ranks: Ranks, *, skip_spikes: float | None = None, max_skips: int = 10
    ) -> None:
        self.ranks, self.skip_spikes, self.max_skips = ranks, skip_spikes, max_skips
        self.unread: list[Tensor] = []
        self.coming: list[Callable[[], Tensor]] = []
        self.load_state_dict({})

    def step(self, optimizer: Optimizer, loss: Tensor, norm: Tensor) -> None:
        """Take or skip the step. `loss` is this rank's part of the mean, `norm` the norm of the
        full gradient.

        Costs one all-reduce of two numbers and about twenty small kernels.
        """
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        numbers = self.ranks.sum(torch.stack([loss, norm.to(loss) / self.ranks.world_size]))
        finite = numbers.isfinite()
        flags = torch.cat([~finite, finite & self._spikes(numbers)])
        skip = flags.any() | (self.in_a_row >= self.max_skips)
        self.in_a_row = torch.where(skip, self.in_a_row + 1, 0.0)
        self.unread.append(
            torch.cat([numbers, flags, self.mean, self.variance, self.in_a_row.view(1)])
        )
        self._remember(numbers, skip)
        step_unless(skip, optimizer)

    def _spikes(self, numbers: Tensor) -> Tensor:
        if self.skip_spikes is None:
            return torch.zeros_like(numbers, dtype=torch.bool)
        above = numbers - self.mean > self.skip_spikes * self.variance.sqrt()
        return above & (self.taken >= MEMORY)

    def _remember(self, numbers: Tensor, skip: Tensor) -> None:
        """Update mean and variance with a step that is taken: Welford's method with decaying
        weights."""
        self.taken = self.taken + ~skip
        weight = (1 / self.taken.clamp(min=1)).clamp(min=1 / MEMORY)
        off = torch.where(skip, 0.0, numbers - self.mean)
        self.mean = self.mean + weight * off
        variance = (1 - weight) * (self.variance + weight * off.square())
        largest = torch.finfo(variance.dtype).max  # and not infinity, which would never fade
        self.variance = torch.where(skip, self.variance, variance.clamp(max=largest))

    def start_read(self) -> None:
        """Start copying the outcomes so far to the host, without waiting for the device."""
        if self.unread:
            self.coming.append(to_host(torch.stack(self.unread)))
            self.unread = []

    def read(self, *, started: bool = False) -> list[StepOutcome]:
        """Return the outcomes of the steps since the last call or, if `started`, of those up to
        the last `start_read`. Waits until the device has run these steps."""
        if not started:
            self.start_read()
        verdicts = [_verdict(row) for rows in self.coming for row in rows().tolist()]
        self.coming = []
        self.last = verdicts[-1] if verdicts else self.last
        return verdicts

    def took_unread(self) -> bool:
        """Return whether a step after those read was taken. Waits for the device."""
        return any(row[-1].item() == 0 for row in self.unread)

    @property
    def is_exhausted(self) -> bool:
        """Return whether `max_skips` consecutive steps were skipped, as of the last read."""
        return self.last.in_a_row >= self.max_skips

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint as plain numbers, exactly."""
        counts = torch.stack([self.taken, self.in_a_row])
        taken, in_a_row, *rest = torch.cat([counts, self.mean, self.variance]).tolist()
        return {
            "taken": int(taken),
            "in_a_row": int(in_a_row),
            "mean": rest[:2],
            "variance": rest[2:],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`; an empty one resets the guard."""

        def tensor(value: Any) -> Tensor:
            return torch.tensor(value, dtype=torch.float32, device=self.ranks.device)

        self.taken = tensor(state.get("taken", 0))
        self.in_a_row = tensor(state.get("in_a_row", 0))
        self.mean = tensor(state.get("mean", [0.0, 0.0]))  # of loss and gradient norm
        self.variance = tensor(state.get("variance", [0.0, 0.0]))
        self.unread, self.coming = [], []
        self.last = StepOutcome(math.nan, math.nan, "", state.get("in_a_row", 0))


def _verdict(row: list[float]) -> StepOutcome:
    numbers, flags, means, variances = row[:2], row[2:6], row[6:8], row[8:10]
    reasons = []
    for name, number, broken, spikes, mean, variance in zip(
        NAMES, numbers, flags[:2], flags[2:], means, variances, strict=True
    ):
        if broken:
            reasons.append(f"{name} is {number}")
        elif spikes:
            size = (number - mean) / math.sqrt(variance) if variance else math.inf
            reasons.append(f"{name} {number:.4g} is {size:.1f} deviations above {mean:.4g}")
    return StepOutcome(numbers[0], numbers[1], ", ".join(reasons), int(row[10]))


@torch.no_grad()
def step_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """Run the optimizer's step unless `skip` is true, without the CPU reading the flag.

    An optimizer with `_step_supports_amp_scaling`, such as PyTorch's fused ones, gets the flag as
    `found_inf` at no extra cost. For any other, weights and state are copied before the step and
    selected afterwards: they are in memory twice, and read and written twice. State that the first
    step creates is taken to start at zero, as AdamW's and Muon's does.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        return
    before = {name: tensor.clone() for name, tensor in _tensors(optimizer).items()}
    optimizer.step()
    for name, tensor in _tensors(optimizer).items():
        chosen = torch.where(skip.to(tensor.device), before.get(name, 0.0), tensor)
        tensor.copy_(chosen)


@torch.no_grad()
def is_finite(optimizer: Optimizer, ranks: Ranks) -> bool:
    """Return whether every weight and every optimizer tensor is finite, on all ranks. Waits for the
    device.

    Checks the minimum and the maximum of each tensor, in one pass that writes nothing: with a NaN,
    both are NaN.
    """
    ends = [
        torch.stack(torch.aminmax(tensor)).to(ranks.device)
        for tensor in _tensors(optimizer).values()
        if tensor.numel()  # a rank may have no part of a short one
    ]
    return not ranks.any(not torch.stack(ends).isfinite().all().item())


def _tensors(optimizer: Optimizer) -> dict[tuple[int, str], Tensor]:
    """Return all weights and optimizer tensors; of sharded ones, this rank's part."""
    tensors = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = {"weight": parameter, **optimizer.state.get(parameter, {})}
            for name, tensor in kept.items():
                if isinstance(tensor, Tensor):
                    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                    tensors[id(parameter), name] = local
    return tensors
