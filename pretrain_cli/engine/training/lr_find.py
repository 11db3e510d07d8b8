"""Learning rate range test: `pretrain train --lr-find` (Smith 2015, arXiv 1506.01186).

Trains with the settings of the run, except that the learning rate grows by a constant factor each
step, from far too small to far too large. The loss first stays, then falls, then rises. The weights
are discarded. The test is short, so its suggestion suits the start of training; a long run usually
wants a lower rate.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.engine.planning.plan import Plan, make_plan
from pretrain_cli.engine.runs.events import Emit, Notice, ignore
from pretrain_cli.engine.runtime.distributed import Ranks, open_ranks
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.engine.runtime.transfer import runs_behind
from pretrain_cli.engine.training.job import Job, set_up
from pretrain_cli.engine.training.prefetch import open_batches
from pretrain_cli.engine.training.step import train_step
from pretrain_cli.engine.training.step_guard import StepOutcome
from pretrain_cli.errors import ConfigError
from pretrain_cli.files import write_whole

LOWEST, HIGHEST = 1e-6, 1.0
FEWEST_STEPS = 10
LEAST_FALL = 0.02
"""Smallest relative fall of the smoothed loss that counts as learning. Not tuned."""
SMOOTHING = 0.8
"""Weight of the previous value in the smoothed loss: an average over about the last five steps."""
TOLERANCE = 0.1
"""The loss has diverged when its smoothed value exceeds the lowest by this share of the first loss
and by half of the improvement so far."""
MARGIN = 4
"""The suggested rate is the rate at the lowest loss divided by this. A factor of two or three above
that rate may already diverge, and a run stays at its rate longer than the test did."""

Progress = Callable[[int, int, float, float], None]
"""Called with (step, steps, learning rate, loss)."""


@dataclass(frozen=True)
class RangeTest:
    """Learning rates and losses of a range test, a value per step, and the suggestion."""

    model: str
    optimizer: str
    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None
    reason: str


def find_learning_rate(
    settings: RunConfig, folder: Path, emit: Emit, progress: Progress, stop: StopRequest
) -> RangeTest | None:
    """Train for `train.steps` with a rising learning rate; write the numbers and a plot to the
    folder.

    Returns None on every rank but the first, which writes and reports. Raises Stopped if `stop`
    requests it.
    """
    if settings.train.steps == "auto" or settings.train.steps < FEWEST_STEPS:
        raise ConfigError(
            f"train.steps: {settings.train.steps}; a range test takes {FEWEST_STEPS} or more"
        )
    with open_ranks(settings.train.device) as ranks:
        emit = emit if ranks.is_first else ignore
        stop.ranks = ranks
        plan = make_plan(settings, ranks, emit, stop)
        rates, losses = _train(plan, ranks, emit, progress, stop)
        if not ranks.is_first:
            return None
    smoothed = smooth(losses)
    suggestion, reason = suggest(rates, smoothed)
    name = plan.recipe.name
    test = RangeTest(plan.name, name, rates, losses, smoothed, suggestion, reason)
    _write(test, folder, emit)
    return test


def _train(
    plan: Plan, ranks: Ranks, emit: Emit, progress: Progress, stop: StopRequest
) -> tuple[list[float], list[float]]:
    """Return learning rates and losses up to the step where the loss diverges."""
    unguarded = plan.settings.train.model_copy(update={"skip_spikes": None})  # a spike is a result
    plan = replace(plan, settings=plan.settings.model_copy(update={"train": unguarded}))
    job = set_up(plan, ranks, open_batches(plan, ranks, emit), emit=emit)
    emit(Notice(f"The rate rises from {LOWEST:g} to {HIGHEST:g}; that of the run is not used"))
    rates, losses = [], []
    try:
        for rate, outcome in _take_steps(job, stop):
            if not math.isfinite(outcome.loss):
                break
            rates.append(rate)
            losses.append(outcome.loss)
            if ranks.is_first:
                progress(len(losses), plan.steps, rate, outcome.loss)
            if outcome.reason or has_diverged(smooth(losses)):
                break  # the guard skipped the step: its gradient is not finite
    finally:
        job.batches.close()
    return rates, losses


def _take_steps(job: Job[Plan], stop: StopRequest) -> Iterator[tuple[float, StepOutcome]]:
    """Yield learning rate and outcome of each step. A GPU's outcome is read while it runs the next
    step."""
    steps, behind = job.plan.steps, None
    for step in range(steps):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (steps - 1))
        stop.check()
        train_step(job, job.batches.next(), StepRates(rate), stop=stop.poll)
        if behind is not None:
            yield behind, job.guard.read(started=True)[-1]
        job.guard.start_read()
        behind = rate
        if not runs_behind(job.ranks.device):
            yield behind, job.guard.read()[-1]
            behind = None
    if behind is not None:
        yield behind, job.guard.read()[-1]


def smooth(losses: list[float]) -> list[float]:
    """Return the exponential moving average of the losses."""
    smoothed, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(mean / weight)
    return smoothed


def has_diverged(smoothed: list[float]) -> bool:
    first, lowest = smoothed[0], min(smoothed)
    return smoothed[-1] > lowest + max(TOLERANCE * first, (first - lowest) / 2)


def suggest(rates: list[float], smoothed: list[float]) -> tuple[float | None, str]:
    """Return (learning rate, reason): the rate at the lowest loss, divided by the margin."""
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    if not smoothed or smoothed[lowest] > (1 - LEAST_FALL) * smoothed[0]:
        return None, "the loss never fell by 2 %; give the test more --steps, or larger ones"
    rate = float(f"{rates[lowest] / MARGIN:.1e}")
    if lowest == len(smoothed) - 1:
        return rate, f"a {MARGIN}th of {rates[lowest]:.1e}, the last, where the loss still fell"
    return rate, (
        f"a {MARGIN}th of {rates[lowest]:.1e}, at which the loss was lowest, {smoothed[lowest]:.3f}"
    )


def _write(test: RangeTest, folder: Path, emit: Emit) -> None:
    """Write lr-find.json, and lr-find.png if matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "lr-find.json", json.dumps(asdict(test), indent=2) + "\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        emit(Notice("No picture: matplotlib is not installed; pip install 'pretrain[plot]'"))
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.semilogx(test.rates, test.losses, color="0.75", linewidth=1, label="loss")
    axes.semilogx(test.rates, test.smoothed, color="tab:blue", label="smoothed")
    if test.suggestion is not None:
        label = f"suggested: {test.suggestion:.1e}"
        axes.axvline(test.suggestion, color="tab:red", linestyle="--", label=label)
    axes.set(title=f"{test.model}, {test.optimizer}", xlabel="learning rate", ylabel="loss")
    axes.legend()
    figure.savefig(folder / "lr-find.png", dpi=120)
