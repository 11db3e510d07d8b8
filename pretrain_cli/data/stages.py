"""Stages: a run goes on with other datasets, proportions or sample lengths from a token on.

    steps     0 ─────────── 800 ─────────── 1,000
    stage     web:9 code:1  web:1 code:1    code:1, because web has been read max_epochs times
    sample    1,024 tokens  4,096 tokens    4,096 tokens

Every step has the same number of tokens. Positions in the training order are counted in samples of
the first stage's length, in all stages, so that a step always moves the position by as many. A
source goes on where the stage before left it; with samples of another length, which are other
samples, it begins anew.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from pretrain_cli.data.batches import Batch, Batches
from pretrain_cli.data.mixture import Mixture, Stage
from pretrain_cli.errors import ConfigError


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a run whose batch is known."""

    first_step: int
    seq_len: int
    weights: tuple[Fraction | None, ...]
    """Weight of each training source; None if it is by size."""
    names: tuple[str, ...]
    """Names of the training sources."""

    def __str__(self) -> str:
        there = [
            name if weight is None else f"{name}:{float(weight):g}"
            for name, weight in zip(self.names, self.weights, strict=True)
            if weight != 0
        ]
        return f"{' '.join(there)}, samples of {self.seq_len:,} tokens"


def plan_stages(
    mixture: Mixture,
    *,
    seq_len: int,
    tokens_per_step: int,
    steps: int,
    max_epochs: float | None,
) -> list[PlannedStage]:
    """Return the stages of a run in order; each begins with a step, at or after its token. Raises
    ConfigError for a length that doesn't divide, and if `max_epochs` leaves no dataset."""
    planned: list[PlannedStage] = []
    names = tuple(source.name for source in mixture.trained_on)
    for stage in mixture.stages:
        length = _length(stage, seq_len, tokens_per_step)
        first = math.ceil(stage.first_token / tokens_per_step)
        if planned and first <= planned[-1].first_step:
            raise ConfigError(
                f"data.stages: the stage after {stage.first_token:,} tokens begins in the same "
                f"step as the one before, and a step has {tokens_per_step:,} tokens; let it begin "
                "later"
            )
        planned.append(PlannedStage(first, length, tuple(mixture.weights(stage)), names))
    if max_epochs is None:
        return planned
    sizes = [len(source.dataset.train.tokens) for source in mixture.trained_on]
    return _capped(planned, sizes, tokens_per_step, steps, max_epochs)


def _length(stage: Stage, seq_len: int, tokens_per_step: int) -> int:
    length = stage.seq_len or seq_len
    if length % seq_len:
        raise ConfigError(
            f"data.stages: seq_len {length:,} is not a multiple of the first stage's {seq_len:,}; "
            f"give for example {max(1, length // seq_len) * seq_len:,}"
        )
    if tokens_per_step % length:
        raise ConfigError(
            f"data.stages: a step's {tokens_per_step:,} tokens are no whole number of samples of "
            f"{length:,}; give another seq_len, or --set train.tokens_per_step"
        )
    return length


def _capped(
    stages: Sequence[PlannedStage],
    sizes: Sequence[int],
    tokens_per_step: int,
    steps: int,
    max_epochs: float,
) -> list[PlannedStage]:
    """Return the stages, with further ones from which on a source that has been read `max_epochs`
    times has no weight."""
    left = [max_epochs * size for size in sizes]  # tokens
    capped: list[PlannedStage] = []
    ends = [*(min(stage.first_step, steps) for stage in stages[1:]), steps]
    for stage, end in zip(stages, ends, strict=True):
        weights, step = list(stage.weights), stage.first_step
        while step < end:
            parts = [size if w is None else w for w, size in zip(weights, sizes, strict=True)]
            if not any(parts):
                raise ConfigError(
                    f"data.max_epochs: after {step:,} of {steps:,} steps, all datasets of the "
                    f"stage have been read {max_epochs:g} times; give fewer --tokens, more text, "
                    "or a larger data.max_epochs"
                )
            rates = [float(part / sum(parts)) * tokens_per_step for part in parts]
            read = [number for number, rate in enumerate(rates) if rate and left[number] < rate]
            for number in read:
                weights[number] = Fraction(0)
            if read:
                continue
            lasts = [int(rest // rate) for rest, rate in zip(left, rates, strict=True) if rate]
            count = min(end - step, *lasts)
            capped.append(replace(stage, first_step=step, weights=tuple(weights)))
            left = [rest - rate * count for rest, rate in zip(left, rates, strict=True)]
            step += count
    return capped


class StagedBatches:
    """Training samples by position, of the stage to which the position belongs."""

    def __init__(self, stages: Sequence[tuple[int, Batches]]) -> None:
        """`stages` are (first step, batches), the first one from step 0 on."""
        self.batches = [batches for _, batches in stages]
        self.samples_per_step = self.batches[0].samples_per_step
        self.firsts = [step * self.samples_per_step for step, _ in stages]

    def at(self, position: int) -> tuple[Batches, int]:
        """Return the batches at a position, and the position of the step's first sample there."""
        number = bisect_right(self.firsts, position) - 1
        batches = self.batches[number]
        step, place = divmod(position - self.firsts[number], self.samples_per_step)
        return batches, step * batches.samples_per_step + place

    def starting_at(self, position: int) -> Batch:
        """Return this rank's share of the step that starts at this position."""
        batches, sample = self.at(position)
        return batches.starting_at(sample)

    def sample(self, position: int) -> tuple[int, np.ndarray]:
        """Return one sample of any rank: its source, and its inputs (T,)."""
        batches, sample = self.at(position)
        return batches.sample(sample)

    def counts(self, position: int) -> list[int]:
        """Return how many samples of the first stage's length come from each source before a
        position."""
        counts = np.zeros(len(self.batches[0].sources), np.int64)
        ends = [*self.firsts[1:], position]
        for batches, first, end in zip(self.batches, self.firsts, ends, strict=True):
            length = self.samples_per_step // batches.samples_per_step
            if (samples := min(end, position) - first) > 0:
                counts += length * np.array(batches.counts(samples // length))
        return counts.tolist()
