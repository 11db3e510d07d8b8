"""The learning rate of each step, as a share of the highest: after warm-up, one of five shapes.

    cosine    ╱‾╲_      linear     ╱╲        constant   ╱‾‾‾‾
    wsd       ╱‾‾‾╲     wsd-sqrt   ╱‾‾‾╲_

wsd and wsd-sqrt (warm-up, stable, decay) hold the rate and come down in the last steps: linearly,
or as 1 − √, fast and then slowly, which Hägele et al. 2024 (arXiv 2405.18392) found to end lower.
What they hold doesn't depend on the number of steps: a checkpoint from before the decay can go on
to any length.
"""

import math

from pretrain_cli.config.run_config import OptimizerSettings


def learning_rate(
    step: int, *, peak: float, steps: int, warmup_steps: int, settings: OptimizerSettings
) -> float:
    """The rate of a step (counted from 0) out of `steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    last = settings.final_fraction
    return peak * (last + (1.0 - last) * _height(progress, settings))


def _height(progress: float, settings: OptimizerSettings) -> float:
    """From 1 down to 0, as progress goes from 0 to 1."""
    decayed = max(0.0, 1.0 - (1.0 - progress) / settings.decay_fraction)
    match settings.schedule:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            return 1.0 - progress
        case "wsd":
            return 1.0 - decayed
        case "wsd-sqrt":
            return 1.0 - math.sqrt(decayed)
        case "constant":
            return 1.0
