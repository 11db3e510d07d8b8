"""Asked to stop: by a signal, or by the clock of train.max_time.

What is under way looks whether it should stop wherever Python has control: between micro-steps,
batches of an evaluation, tokens of a sample. It is then abandoned, and the run saved as the last
whole step left it. A second signal ends the process at once, also while it waits in a kernel or
for another rank: a thread sees to it. What is on disk is whole at any instant.

This module imports no torch, so that a command can be asked to stop before torch is loaded.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Protocol, Self, TypeVar

from pretrain_cli.config.setting_types import seconds_of
from pretrain_cli.engine.runtime.process_settings import process_age

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST = 1.0
"""Seconds in which another signal is the first one again, by way of the launcher."""
BETWEEN_AGREEMENTS = 2.0
"""Seconds, about, in which several ranks agree once on whether to stop: it costs a host sync."""
SPARE = 3.0
"""Seconds of the clock left for what can't be measured: closing files, leaving the process."""

T = TypeVar("T")


class Stopped(Exception):
    """The current work is abandoned because a stop was requested."""


class Several(Protocol):
    """The part of `Ranks` that is needed here."""

    @property
    def world_size(self) -> int: ...

    def mean(self, numbers: list[float]) -> list[float]: ...


class StopRequest:
    """Request to stop: by a signal, at a process age of `limit` (a time as in train.max_time), or
    after step `after_step`."""

    def __init__(self, *, limit: str | None = None, after_step: int | None = None) -> None:
        self.limit, self.after_step = limit, after_step
        self.reason = ""
        """Why this rank was asked to stop: a signal's name, or the limit."""
        self.out_of_time = False
        self.ranks: Several | None = None
        self.agreed = False
        self.save_seconds = 0.0
        """Seconds of the last save; an estimate until there is one."""
        self.gap, self.looked = 0.0, time.perf_counter()
        self.polls, self.polls_between, self.agreed_at = 0, 1, time.perf_counter()
        self.came = 0.0
        """Time of the first signal, by the monotonic clock; 0 before it."""
        self.restore: dict[int, object] = {}
        self.pipe: tuple[int, int] | None = None

    # --- signals ---------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Take the signals, from now to the end of the block."""
        if threading.current_thread() is threading.main_thread():
            self.pipe = os.pipe()
            os.set_blocking(self.pipe[1], False)
            self.restore = {number: signal.signal(number, self._take) for number in SIGNALS}
            self.wakeup = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self.pipe[0],), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> bool | None:
        if self.pipe is None:
            return
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.restore.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        os.close(self.pipe[1])  # ends the thread
        self.pipe = None

    def _take(self, number: int, frame: FrameType | None) -> None:
        """Python must have a handler for a signal's number to be written to the pipe."""

    def _watch(self, pipe: int) -> None:
        """Wait for signals: the interpreter writes each one's number into the pipe as it comes."""
        while number := os.read(pipe, 1):
            if number[0] not in SIGNALS:
                continue
            if not self.came:
                self.came = time.monotonic()
                self.reason = self.reason or signal.Signals(number[0]).name
            elif time.monotonic() - self.came > SAME_REQUEST:
                os._exit(128 + number[0])
        os.close(pipe)

    # --- the clock -------------------------------------------------------------------------------

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        self.save_seconds = seconds

    def paused(self) -> None:
        """Leave the time since the last look at the clock out of account: it was not training."""
        self.looked = time.perf_counter()

    @property
    def room(self) -> float:
        """Seconds before the limit at which to stop: two saves, as one may be under way, twice the
        time from one look at the clock to the next, and some to spare."""
        return 2 * self.save_seconds + 2 * self.gap + SPARE

    def _look_at_the_clock(self) -> None:
        now = time.perf_counter()
        gap, self.looked = now - self.looked, now
        self.gap = max(gap, self.gap - gap / 10)  # that of a first step, which compiles, wears off
        if self.limit and not self.reason and process_age() + self.room >= seconds_of(self.limit):
            self.reason, self.out_of_time = f"train.max_time: {self.limit}", True

    # --- asking ----------------------------------------------------------------------------------

    @property
    def asked(self) -> bool:
        """True if this rank was asked to stop."""
        self._look_at_the_clock()
        return bool(self.reason)

    def agree(self) -> bool:
        """Return whether any rank was asked to stop. Every rank must call it, and waits for the
        others."""
        asked = self.asked
        if self.ranks is None or self.ranks.world_size == 1:
            self.agreed = asked
        elif not self.agreed:
            now = time.perf_counter()
            share, seconds = self.ranks.mean([float(asked), now - self.agreed_at])
            self.agreed = share > 0
            allowed = int(self.polls_between * BETWEEN_AGREEMENTS / max(seconds, 1e-3))
            self.polls_between = max(1, min(allowed, 2 * self.polls_between))
            self.polls, self.agreed_at = 0, now
        return self.agreed

    def poll(self) -> bool:
        """As `agree`, but several ranks agree only once in a while: after as many calls as fill
        that time, which they all make alike."""
        self.polls += 1
        alone = self.ranks is None or self.ranks.world_size == 1
        if alone or self.polls >= self.polls_between:
            return self.agree()
        self._look_at_the_clock()
        return self.agreed

    def check(self) -> None:
        """Raise Stopped where `poll` says so."""
        if self.poll():
            raise Stopped

    def after(self, step: int) -> None:
        """Raise Stopped at the step that the run was to stop after."""
        if step == self.after_step:
            raise Stopped

    def check_here(self) -> None:
        """Raise Stopped once this rank was asked to, whatever the others do."""
        if self.asked:
            raise Stopped

    def until_asked(self, items: Iterable[T]) -> Iterator[T]:
        """The items, one by one; raises Stopped between two of them once this rank was asked to."""
        for item in items:
            self.check_here()
            yield item


class CutShort(KeyboardInterrupt):
    """The current measurement is abandoned."""


class Interruption(StopRequest):
    """Request to stop a benchmark: a signal abandons the measurement in progress.

    Results so far are shown and written, marked as cut short. The exit code is 128 plus the
    signal's number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.signal: signal.Signals | None = None
        """First signal that came."""
        self.gives_up = False

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else 0

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> bool:
        super().__exit__(kind, *exception)
        return kind is CutShort

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            if self.gives_up:
                raise CutShort

    @contextlib.contextmanager
    def can_be_given_up(self) -> Iterator[None]:
        """Raise CutShort in this block if a signal comes; elsewhere files are left whole."""
        self.gives_up = True
        try:
            if self.signal is not None:
                raise CutShort
            yield
        finally:
            self.gives_up = False
