"""Schedules. Of the learning rate: linear warm-up, then one of five shapes.

    cosine    ╱‾╲_      linear     ╱╲        constant   ╱‾‾‾‾
    wsd       ╱‾‾‾╲     wsd-sqrt   ╱‾‾‾╲_

wsd and wsd-sqrt (warm-up, stable, decay) hold the rate and decay it in the last steps: linearly, or
as 1 − √, which falls fast and then slowly. Hägele et al. 2024 (arXiv 2405.18392) found that 1 − √
ends lower. The stable rate doesn't depend on the number of steps, so a run can resume from a
checkpoint before the decay and train for any length.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from pretrain_cli.config.run_config import OptimizerSettings
from pretrain_cli.engine.optim.recipe import Recipe


class StepRates(NamedTuple):
    """The optimizer's numbers that change from step to step."""

    learning_rate: float
    """Rate of a group with scale 1."""
    decay: float = 1.0
    """Factor on each group's weight decay."""
    momentum: float | None = None
    """Muon's momentum; None leaves it."""


def rates_at(step: int, recipe: Recipe, *, steps: int) -> StepRates:
    """Return the rates of a step, counted from 0, in a run of `steps`."""
    settings, peak = recipe.settings, recipe.learning_rate
    warmup = recipe.warmup_steps
    rate = learning_rate(step, peak=peak, steps=steps, warmup_steps=warmup, settings=settings)
    is_cosine = settings.weight_decay_schedule == "cosine"
    decay = _cosine(step / steps, 0.0) if is_cosine else 1.0
    return StepRates(rate, decay, _momentum(step, settings, rate / peak))


def _momentum(step: int, settings: OptimizerSettings, height: float) -> float:
    """Return Muon's momentum: from `momentum_start` to `momentum` in the first steps, to
    `momentum_end` as the rate falls below its peak, of which `height` is the share."""
    momentum, start, end = settings.momentum, settings.momentum_start, settings.momentum_end
    if start is not None and step < settings.momentum_warmup_steps:
        return start + (momentum - start) * step / settings.momentum_warmup_steps
    return momentum if end is None else end + (momentum - end) * height


def learning_rate(
    step: int, *, peak: float, steps: int, warmup_steps: int, settings: OptimizerSettings
) -> float:
    """Return the learning rate of a step, counted from 0, in a run of `steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    decayed = max(0.0, 1.0 - (1.0 - progress) / settings.decay_fraction)
    last = settings.final_fraction
    return peak * (last + (1.0 - last) * SCHEDULES[settings.schedule](progress, decayed))


def _cosine(progress: float, decayed: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(progress: float, decayed: float) -> float:
    return 1.0 - progress


def _wsd(progress: float, decayed: float) -> float:
    return 1.0 - decayed


def _wsd_sqrt(progress: float, decayed: float) -> float:
    return 1.0 - math.sqrt(decayed)


def _constant(progress: float, decayed: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "wsd-sqrt": _wsd_sqrt,
    "constant": _constant,
}
"""Shapes after warm-up: (progress, decayed) -> height. Progress goes from 0 to 1 over the run,
`decayed` from 0 to 1 over its last `decay_fraction`; the height goes from 1 to 0, or stays."""
