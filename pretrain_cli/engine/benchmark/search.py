"""Search for the largest micro-batch that fits, and for the fastest one.

    1, 2, 4, 8, …     until two in a row bring no gain, or memory or time forbids more
    around the best   the best, three quarters of it, one and a half times it, its neighbours
    the largest       where the memory estimate, corrected by the peaks so far, reaches the
                      limit; tried, and corrected again if wrong

Every size is measured in its own process. Sizes that are estimated not to fit are never tried: a
CPU machine would start to swap. If one still runs out of GPU memory, that is reported and the
search continues.
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
from pretrain_cli.engine.benchmark.timing import resolve
from pretrain_cli.engine.benchmark.workload import Arm, Repeats, Workload
from pretrain_cli.engine.planning.memory_estimate import (
    StepShape,
    estimate,
    largest,
    speed_settings,
)
from pretrain_cli.engine.planning.micro_batch import TIE_TOLERANCE, fastest
from pretrain_cli.units import size as told

SCOUTING = Repeats(rounds=1, steps=2, warmup=1)
ONCE = Repeats(rounds=1, steps=1, warmup=1)
LONGEST = 20.0
"""Seconds of the longest acceptable step; larger micro-batches are not tried."""
TRIES = 3
"""Attempts at finding the largest."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The largest and the fastest micro-batch, and the measurements behind them, by micro-batch."""

    fastest: int
    largest: int
    limit: str
    """Reason there is no larger one."""
    room: int
    """Bytes a process may use."""
    tokens_per_second: dict[int, float]
    peaks: dict[int, int]
    """Measured peak bytes."""
    estimates: dict[int, int]
    """Estimated peak bytes."""


class MicroBatchSearch(Rounds):
    """Rounds whose arms, one micro-batch each, are chosen during the search."""

    def __init__(
        self,
        workload: Workload,
        speed: SpeedConfig,
        repeats: Repeats,
        *,
        room: int,
        start: Start | None = None,
    ) -> None:
        """`room` is the number of bytes a process may use."""
        super().__init__([], repeats, start=start)
        self.workload, self.speed, self.room = workload, speed, room
        in_force = resolve(workload, speed)
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
        """Return the answers; None if not even one sample could be measured, or the search was cut
        short."""
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
        """Return the results, by size."""
        return sorted(super().results(), key=lambda r: r.workload["micro_batch_size"])

    def answers(self) -> dict[str, Any]:
        found = self.found()
        return {"micro_batch": None if found is None else dataclasses.asdict(found)}

    def estimate(self, size: int) -> int:
        """Return the estimated bytes of a micro-batch."""
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
        """Return the largest size by the corrected estimate, between the sizes that fitted and
        those that did not."""
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
        """Return the estimate, scaled by its error at the largest measured size."""
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

    # --- results so far --------------------------------------------------------------------------

    def _rates(self) -> dict[int, float]:
        """Return tokens/s by micro-batch, of those measured."""
        rounds = {size: self.measured[arm.name] for size, arm in self.tried.items()}
        return {
            size: statistics.median(one.tokens / seconds for one in each for seconds in one.times)
            for size, each in rounds.items()
            if each
        }

    def _peaks(self) -> dict[int, int]:
        rounds = {size: self.measured[arm.name] for size, arm in self.tried.items()}
        return {size: max(one.peak_memory for one in each) for size, each in rounds.items() if each}
