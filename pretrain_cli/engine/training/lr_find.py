"""`pretrain train --lr-find`: a range test (Smith 2015, arXiv 1506.01186) that suggests a rate.

The run as it would be, but for the rate: it rises by the same factor each step, from far too small
to far too large. The loss stays, falls, and rises again; the weights are thrown away. The test is
short, so what it finds is the rate of a beginning: a long run wants rather less.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.engine.optim.optimizer import build_optimizer, set_learning_rate
from pretrain_cli.engine.planning.plan import Plan, make_plan
from pretrain_cli.engine.runs.events import Emit, Event, Notice
from pretrain_cli.engine.runtime.distributed import Ranks, open_ranks, parallelize
from pretrain_cli.engine.runtime.speed import apply_process_settings, build_model, compile_blocks
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.engine.training.auxiliary_losses import AuxiliaryLosses
from pretrain_cli.engine.training.prefetch import Prefetcher, open_batches
from pretrain_cli.engine.training.step import train_step
from pretrain_cli.engine.training.train import set_weights
from pretrain_cli.errors import ConfigError
from pretrain_cli.files import write_whole

LOWEST, HIGHEST = 1e-6, 1.0
FEWEST_STEPS = 10
LEAST_FALL = 0.02
"""Smallest fall of the smoothed loss, as a share, that counts as learning. Not tuned."""
SMOOTHING = 0.8
"""Weight of the previous loss in the smoothed one: an average over about the last five steps."""
TOLERANCE = 0.1
"""A smoothed loss above the lowest by this share of the first, and by half of what was gained, has
diverged."""
MARGIN = 4
"""The suggestion is the rate of the lowest loss over this: the next factor of two or three may
diverge, and a run stays at its rate for longer than the test did."""

Progress = Callable[[int, int, float, float], None]
"""(step, steps, rate, loss)"""


@dataclass(frozen=True)
class RangeTest:
    """Results of the range test, step by step."""

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
    """Train with a rising rate for `train.steps`, and leave a picture and numbers in the folder.

    None on ranks but the first, which speaks and writes. Raises Stopped where `stop` says so."""
    if settings.train.steps == "auto" or settings.train.steps < FEWEST_STEPS:
        raise ConfigError(
            f"train.steps: {settings.train.steps}; a range test takes {FEWEST_STEPS} or more"
        )
    with open_ranks(settings.train.device) as ranks:
        emit = emit if ranks.is_first else _silent
        stop.ranks = ranks
        plan = make_plan(settings, ranks, emit, stop)
        rates, losses = _train(plan, ranks, emit, progress, stop)
        if not ranks.is_first:
            return None
    smoothed = smooth(losses)
    suggestion, reason = suggest(rates, smoothed)
    name = plan.settings.optimizer.name
    test = RangeTest(plan.name, name, rates, losses, smoothed, suggestion, reason)
    _write(test, folder, emit)
    return test


def _silent(event: Event) -> None:
    """Ignore an event; for ranks other than the first."""


def _train(
    plan: Plan, ranks: Ranks, emit: Emit, progress: Progress, stop: StopRequest
) -> tuple[list[float], list[float]]:
    """Rates and losses, up to where the loss diverges."""
    apply_process_settings(plan.speed)
    batches = open_batches(plan, ranks, emit)
    decoder = build_model(plan.model, plan.speed, ranks.device)
    set_weights(decoder, plan, None, emit)
    compile_blocks(decoder, plan.speed)
    model = parallelize(decoder, ranks, plan.settings.train.parallel)
    optimizer = build_optimizer(decoder, plan.settings.optimizer, fused=plan.speed.fused_optimizer)
    feed = Prefetcher(batches, first_sample=0, device=ranks.device, prefetch=plan.speed.prefetch)
    emit(Notice(f"The rate rises from {LOWEST:g} to {HIGHEST:g}; that of the run is not used"))
    rates, losses = [], []
    try:
        for step in range(plan.steps):
            rate = LOWEST * (HIGHEST / LOWEST) ** (step / (plan.steps - 1))
            set_learning_rate(optimizer, rate)
            stop.check()
            batch = feed.next()
            loss, _ = train_step(
                model,
                optimizer,
                batch.inputs,
                batch.targets,
                micro_batch_size=plan.micro_batch_size,
                clip=plan.settings.optimizer.clip,
                world_size=ranks.world_size,
                counted=batch.counted,
                documents=batch.documents,
                terms=AuxiliaryLosses(plan.coefficients) if plan.coefficients else None,
                stop=stop.poll,
            )
            mean = ranks.sum(loss).item()
            if not math.isfinite(mean):
                break
            rates.append(rate)
            losses.append(mean)
            if ranks.is_first:
                progress(step + 1, plan.steps, rate, mean)
            if has_diverged(smooth(losses)):
                break
    finally:
        feed.close()
    return rates, losses


def smooth(losses: list[float]) -> list[float]:
    """A mean that forgets, of the losses so far."""
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
    """(a rate, why): the one of the lowest loss, with a margin."""
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
    """lr-find.json, and lr-find.png where matplotlib is installed."""
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
