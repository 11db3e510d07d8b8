"""Rounds: every arm runs once in each round, and every second round runs in reverse order, so that
a temporary slowdown of the machine does not fall on one arm only."""

import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.results import Figures, Result, summarize
from pretrain_cli.engine.benchmark.timing import Round, resolve
from pretrain_cli.engine.benchmark.workload import Arm, Repeats, Workload, run_timing
from pretrain_cli.engine.runtime.peak_flops import Peak
from pretrain_cli.engine.runtime.process_settings import PROCESS_SETTINGS
from pretrain_cli.engine.runtime.profiler import Profile
from pretrain_cli.errors import PretrainError

Start = Callable[..., Any]
"""`run_timing`; tests pass a function that runs in this process."""


class Rounds:
    """Measurements of all arms, a given number of rounds. Each round also measures the device's
    peak FLOP/s for each type in use; the best value counts."""

    def __init__(self, arms: list[Arm], repeats: Repeats, *, start: Start | None = None) -> None:
        self.repeats, self.start = repeats, start or run_timing
        self.arms: list[Arm] = []
        self.measured: dict[str, list[Round]] = {}
        self.failures: dict[str, str] = {}
        """Why an arm came to an end, and its traceback where that is a bug."""
        self.tracebacks: list[str] = []
        self.peaks: dict[str, Peak] = {}
        self.dtypes: dict[str, str] = {}
        self.cut_short = ""
        """The signal that ended it early."""
        for arm in arms:
            self.add(arm)

    def add(self, arm: Arm) -> None:
        """Add an arm at the end."""
        self.arms.append(arm)
        self.measured[arm.name] = []
        if not arm.left_out:
            self.dtypes[arm.name] = _peak_dtype(arm)

    def go(self) -> Iterator[str]:
        """Run the measurements, announcing each one."""
        with tempfile.TemporaryDirectory(prefix="pretrain-compiled-") as folder:
            yield from self._in_turn(self.arms, Path(folder))

    def _in_turn(self, arms: list[Arm], folder: Path) -> Iterator[str]:
        for number in range(self.repeats.rounds):
            said = f"round {number + 1} of {self.repeats.rounds}: "
            for dtype in dict.fromkeys(self.dtypes.values()):
                yield f"{said}the peak in {dtype}"
                self._measure_peak(dtype, folder)
            for arm in arms if number % 2 == 0 else reversed(arms):
                if not arm.left_out and arm.name not in self.failures:
                    yield said + arm.name
                    self._measure(arm, self.repeats, folder)

    def _measure_peak(self, dtype: str, folder: Path) -> None:
        arm = next(arm for arm in self.arms if self.dtypes.get(arm.name) == dtype)
        in_process = {name: getattr(arm.speed, name) for name in PROCESS_SETTINGS}
        asked = SpeedConfig.model_validate({"dtype": dtype} | in_process)
        found = self.start("measure_peak", asked, folder, arm.workload.device, asked)
        before = self.peaks.get(dtype)
        if before is None or found.measured > before.measured:
            self.peaks[dtype] = found

    def _measure(self, arm: Arm, repeats: Repeats, folder: Path) -> None:
        try:
            measured = self.start("measure_round", arm.speed, folder, arm, repeats)
        except BrokenProcessPool:
            self.failures[arm.name] = "its process was killed, perhaps because memory ran out"
        except torch.OutOfMemoryError:
            self.failures[arm.name] = "out of memory"
        except PretrainError as error:
            self.failures[arm.name] = str(error)
        except Exception as error:
            self.failures[arm.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            self.tracebacks.append("".join(traceback.format_exception(error)))
        else:
            self.measured[arm.name].append(measured)

    def cut(self, signal: str) -> None:
        """Mark the benchmark as ended early. Arms that were not measured say so."""
        self.cut_short = signal
        for arm in self.arms:
            if not arm.left_out and not self.measured[arm.name]:
                self.failures.setdefault(arm.name, f"{signal} came first")

    def results(self) -> list[Result]:
        """Return the results so far."""
        return [
            summarize(
                arm,
                self.measured,
                self.peaks.get(self.dtypes.get(arm.name, "")),
                self.failures.get(arm.name, ""),
            )
            for arm in self.arms
        ]

    def answers(self) -> dict[str, Any]:
        """Return the results of a search, if one was made."""
        return {}

    def profile(self, arm: Arm, trace: Path) -> Profile:
        """Profile a step of one arm in another fresh process."""
        with tempfile.TemporaryDirectory(prefix="pretrain-compiled-") as folder:
            return self.start("profile_arm", arm.speed, Path(folder), arm, self.repeats, str(trace))


def _peak_dtype(arm: Arm) -> str:
    """Return the type whose peak an arm's MFU refers to. For float8 it is bfloat16, because much of
    the step still runs in it."""
    speed = resolve(arm.workload, arm.speed, training=not arm.forward_only)
    return str(speed.compute_dtype).removeprefix("torch.")


REPEATS = Repeats(rounds=1, steps=5, warmup=2)


def calibrate(workload: Workload, asked: SpeedConfig, *, start: Start | None = None) -> Figures:
    """Return rates and peak memory of the training step, measured in a fresh process."""
    rounds = Rounds([Arm(name=workload.name, workload=workload, speed=asked)], REPEATS, start=start)
    for _ in rounds.go():
        pass
    (result,) = rounds.results()
    if result.figures is None:
        raise PretrainError(f"--calibrate: the steps could not be timed: {result.reason}")
    return result.figures
