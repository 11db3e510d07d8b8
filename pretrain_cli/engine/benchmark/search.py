"""The largest micro-batch that fits and the fastest, found by measuring.

    1, 2, 4, 8, …     until two in a row bring nothing more, or memory or time forbids it
    around the best   it, three quarters of it, one and a half, its neighbours: in turn
    the largest       where the estimate, corrected by the peaks so far, meets the room; tried,
                      and again where it was wrong

Every size is measured in a process of its own. None is tried that isn't estimated to fit: a CPU's
machine would begin to swap. What is out of a GPU's memory all the same is told and left.
"""

import dataclasses
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.results import Result
from pretrain_cli.engine.benchmark.rounds import Rounds, Start
from pretrain_cli.engine.benchmark.workload import Arm, Repeats, Workload
from pretrain_cli.engine.planning.memory_estimate import (
    StepShape,
    estimate,
    largest,
    speed_settings,
)
from pretrain_cli.engine.planning.micro_batch import TIE_TOLERANCE, fastest
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.units import size as told

SCOUTING = Repeats(rounds=1, steps=2, warmup=1)
ONCE = Repeats(rounds=1, steps=1, warmup=1)
LONGEST = 20.0
"""Seconds of a step: a micro-batch that takes longer is not tried, whatever would fit."""
TRIES = 3
"""To find the largest."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The two answers, with what they rest on, by micro-batch."""

    fastest: int
    largest: int
    limit: str
    """Why there is no larger one."""
    room: int
    """Bytes that a process may take."""
    tokens_per_second: dict[int, float]
    peaks: dict[int, int]
    """Bytes, measured."""
    estimates: dict[int, int]
    """Bytes, as they were estimated."""


class MicroBatchSearch(Rounds):
    """Rounds whose arms, a micro-batch each, are found as they go."""

    def __init__(
        self,
        workload: Workload,
        speed: SpeedConfig,
        repeats: Repeats,
        *,
        room: int,
        start: Start | None = None,
    ) -> None:
        """`room` is how many bytes a process may take."""
        super().__init__([], repeats, start=start)
        self.workload, self.speed, self.room = workload, speed, room
        in_force = resolve_speed(speed, torch.device(workload.device))
        self.settings = speed_settings(in_force)
        self.in_force = {name: each.in_force for name, each in in_force.decisions.items()}
        self.tried: dict[int, Arm] = {}
        self.limit = ""

    def go(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="pretrain-compiled-") as name:
            folder = Path(name)
            yield from self._double(folder)
            if not self._fitting():
                return
            yield from self._look_around(folder)
            yield from self._try_largest(folder)

    def found(self) -> Found | None:
        """The answers; None where not even one sample could be measured, or not all was."""
        fitting, rates, peaks = sorted(self._fitting()), self._rates(), self._peaks()
        if not fitting or self.cut_short:
            return None
        rates = {size: rates[size] for size in fitting}
        return Found(
            fastest=fastest(rates),
            largest=fitting[-1],
            limit=self.limit,
            room=self.room,
            tokens_per_second=rates,
            peaks={size: peaks[size] for size in fitting},
            estimates={size: self.estimate(size) for size in fitting},
        )

    def results(self) -> list[Result]:
        """By size."""
        return sorted(super().results(), key=lambda r: r.workload["micro_batch_size"])

    def answers(self) -> dict[str, Any]:
        found = self.found()
        return {"micro_batch": None if found is None else dataclasses.asdict(found)}

    def estimate(self, size: int) -> int:
        """Bytes that a micro-batch takes."""
        training = StepShape(
            model=self.workload.model,
            seq_len=self.workload.seq_len,
            micro_batch_size=size,
            device=torch.device(self.workload.device).type,
            **self.settings,
        )
        return estimate(training).peak

    # --- the search ------------------------------------------------------------------------------

    def _double(self, folder: Path) -> Iterator[str]:
        size, no_better = 1, 0
        while no_better < 2 and self._may_try(size):
            before = max(self._rates().values(), default=0.0)
            yield from self._try(size, SCOUTING, folder)
            if size not in self._rates():
                return
            no_better = 0 if self._rates()[size] > (1 + TIE_TOLERANCE) * before else no_better + 1
            size *= 2

    def _look_around(self, folder: Path) -> Iterator[str]:
        best = fastest(self._rates())
        for size in (best * 3 // 4, best * 3 // 2):
            if size and size not in self.tried and self._may_try(size):
                self._add(size)
        near = [arm for size, arm in self.tried.items() if best / 2 <= size <= 2 * best]
        yield from self._in_turn(near, folder)

    def _try_largest(self, folder: Path) -> Iterator[str]:
        for _ in range(TRIES):
            size = self._largest_that_should_fit()
            if size in self.tried:
                return
            yield from self._try(size, ONCE, folder)

    def _largest_that_should_fit(self) -> int:
        """By the estimate, corrected; between what fitted and what did not."""
        most = max(self._fitting())
        size = max(most, largest(self._corrected, self.room))
        too_large = [size for size in self.tried if size > most and size not in self._fitting()]
        if too_large and size >= min(too_large):
            size = (most + min(too_large)) // 2
        in_time = int(self._most_in_time())
        self.limit = f"{size + 1} would take about {told(self._corrected(size + 1))}"
        if in_time < size:
            self.limit = f"of more a step takes over {LONGEST:.0f} s, and {size} should fit"
        return max(most, min(size, in_time))

    def _corrected(self, size: int) -> int:
        """The estimate, by what it was wrong where most was measured."""
        peaks = self._peaks()
        return round(self.estimate(size) * peaks[max(peaks)] / self.estimate(max(peaks)))

    def _fitting(self) -> list[int]:
        return [size for size, peak in self._peaks().items() if peak <= self.room]

    def _most_in_time(self) -> float:
        rate = max(self._rates().values(), default=math.inf)
        return rate * LONGEST / self.workload.seq_len

    def _may_try(self, size: int) -> bool:
        return self.estimate(size) <= self.room and size <= self._most_in_time()

    def _try(self, size: int, repeats: Repeats, folder: Path) -> Iterator[str]:
        arm = self._add(size)
        yield f"looking around: {arm.name}"
        self._measure(arm, repeats, folder)

    def _add(self, size: int) -> Arm:
        workload = dataclasses.replace(self.workload, micro_batch_size=size)
        beside = self.arms[0].name if self.arms else ""
        arm = Arm(name=f"micro-batch {size}", workload=workload, speed=self.speed, beside=beside)
        self.tried[size] = arm
        self.add(arm)
        return arm

    # --- what is known so far --------------------------------------------------------------------

    def _rates(self) -> dict[int, float]:
        """Tokens/s by micro-batch, of those that were measured."""
        rounds = {size: self.measured[arm.name] for size, arm in self.tried.items()}
        return {
            size: statistics.median(one.tokens / seconds for one in each for seconds in one.times)
            for size, each in rounds.items()
            if each
        }

    def _peaks(self) -> dict[int, int]:
        rounds = {size: self.measured[arm.name] for size, arm in self.tried.items()}
        return {size: max(one.peak_memory for one in each) for size, each in rounds.items() if each}
