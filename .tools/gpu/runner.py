"""Run slots one after another, each in its own process and within its own time.

    slot fits ──> fork ──> done | failed | over its limit (killed) ──> next slot
        └─ no: dropped, by name

Processes are forked from a server that has loaded torch but has not touched the GPU, which saves
each of them the seconds of the import. Every process leads a process group, which is killed whole:
compilers and tests that it started end with it.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gpu.check import RESULTS, Check, append

LOG = "log.txt"
GRACE_S = 2.0
"""Seconds from SIGTERM to SIGKILL."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One part of the check."""

    name: str
    function: str
    """`module:function`, called with a Check in the slot's process."""
    limit_s: float
    least_s: float
    """Seconds below which starting it is no use."""
    is_timed: bool = False
    """True if nothing else may run beside it."""
    about: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a slot ended."""

    slot: str
    state: str
    """done, failed, over its limit, dropped, or interrupted."""
    seconds: float
    reason: str = ""


class Runner:
    """Runs slots until the deadline. `preload` names modules that the server imports once."""

    def __init__(
        self, check: Check, *, preload: Sequence[str] = (), say: Callable[[str], None] = print
    ) -> None:
        """The deadline of the whole is `check.until`."""
        self.check, self.say = check, say
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*preload])
        self.outcomes: list[Outcome] = []
        self.background: list[BaseProcess] = []

    def run(self, slots: Sequence[Slot], background: Callable[[], None] = lambda: None) -> None:
        """Run the slots in order. `background` is called after the first one, and what it started
        is stopped before the first slot that is timed."""
        try:
            for number, slot in enumerate(slots):
                if number == 1:
                    background()
                if slot.is_timed:
                    self.stop_background()
                self._finish(self._run_one(slot))
        except KeyboardInterrupt:
            ended = {outcome.slot for outcome in self.outcomes}
            for slot in slots:
                if slot.name not in ended:
                    self._finish(Outcome(slot.name, "interrupted", 0.0, "the check was stopped"))
        finally:
            self.stop_background()

    def start_background(self, slot: Slot) -> None:
        """Start a process that only fills the cache of compiled kernels."""
        check = replace(self.check, slot="compile", compile_only=True)
        self.background.append(self._start(slot, check))

    def stop_background(self) -> None:
        for process in self.background:
            kill(process)
        self.background = []

    def _run_one(self, slot: Slot) -> Outcome:
        left = self.check.until - time.monotonic()
        if left < slot.least_s:
            return Outcome(
                slot.name, "dropped", 0.0, f"{max(0.0, left):.0f} s left of {slot.least_s:.0f}"
            )
        limit, began = min(slot.limit_s, left), time.monotonic()
        self.say(f"{slot.name}: at most {limit:.0f} s")
        process = self._start(slot, replace(self.check, slot=slot.name, until=began + limit))
        try:
            process.join(limit)
            is_over = process.is_alive()
        finally:
            kill(process)
        seconds = time.monotonic() - began
        if is_over:
            return Outcome(slot.name, "over its limit", seconds, f"killed after {limit:.0f} s")
        if process.exitcode:
            return Outcome(slot.name, "failed", seconds, f"exit code {process.exitcode}")
        return Outcome(slot.name, "done", seconds)

    def _start(self, slot: Slot, check: Check) -> BaseProcess:
        process = self.context.Process(target=enter, args=(slot.function, check), name=slot.name)
        process.start()
        return process

    def _finish(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        row = {
            "slot": outcome.slot,
            "arm": "",
            "state": outcome.state,
            "wall_s": round(outcome.seconds, 1),
            "error": outcome.reason or None,
        }
        append(self.check.out / RESULTS, row)
        why = f", {outcome.reason}" if outcome.reason else ""
        self.say(f"{outcome.slot}: {outcome.state} after {outcome.seconds:.0f} s{why}")


def enter(function: str, check: Check) -> None:
    """Run a slot in this process, which becomes the leader of a process group. Output goes to the
    log."""
    with contextlib.suppress(PermissionError):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _log_to(check.out / LOG)
    print(f"\n--- {check.slot}: {function}", flush=True)
    if check.compile_only:
        os.nice(5)
    try:
        module, name = function.split(":")
        slot: Callable[[Check], Any] = getattr(importlib.import_module(module), name)
        slot(check)
    except Exception as error:
        traceback.print_exc()
        check.write("", ok=False, error=f"{type(error).__name__}: {error}"[:300])
        sys.stderr.flush()
        os._exit(1)


def _log_to(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)


def kill(process: BaseProcess) -> None:
    """End a process, and everything in its process group, also if it has ended by itself."""
    _signal(process, signal.SIGTERM)
    process.join(GRACE_S)
    _signal(process, signal.SIGKILL)
    process.join()


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
    if process.is_alive():  # it may not lead a group yet
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
