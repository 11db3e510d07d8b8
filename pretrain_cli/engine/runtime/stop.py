"""Stop requests: by a signal, or by the time limit train.max_time.

Work checks for a request between micro-steps, batches of an evaluation, and tokens of a sample. On
a request the current work is abandoned, and the run is saved in the state after the last completed
step. A second signal ends the process at once, even during a kernel or while it waits for another
rank, because a separate thread handles it. Files on disk are complete at every instant.

This module imports no torch, so that a command can receive a request before torch is loaded.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from types import FrameType
from typing import Protocol, Self, TypeVar

from pretrain_cli.config.setting_types import seconds_of
from pretrain_cli.engine.runtime.process_settings import process_age

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST = 1.0
"""Seconds after the first signal in which another counts as the same request: the launcher forwards
signals."""
BETWEEN_AGREEMENTS = 2.0
"""Approximate seconds between two agreements of several ranks; each costs a host sync."""
SPARE = 3.0
"""Seconds reserved before the limit for work that can't be measured: closing files, exiting."""

T = TypeVar("T")


class Stopped(Exception):
    """The current work is abandoned because a stop was requested."""


class Several(Protocol):
    """Part of `Ranks` that this module needs; importing `Ranks` would load torch."""

    @property
    def world_size(self) -> int: ...

    def mean(self, numbers: list[float]) -> list[float]: ...


class StopRequest:
    """Request to stop: by a signal, before the process age reaches `limit` (a duration as in
    train.max_time), or after step `after_step`. `since` is the process age, in seconds, from which
    the limit counts."""

    def __init__(
        self, *, limit: str | None = None, after_step: int | None = None, since: float = 0.0
    ) -> None:
        self.limit, self.after_step, self.since = limit, after_step, since
        self.reason = ""
        """Reason why this rank was asked to stop: a signal's name or the limit; empty if it wasn't.
        """
        self.out_of_time = False
        self.ranks: Several | None = None
        self.agreed = False
        self.save_seconds = 0.0
        """Seconds of the last save; an estimate until there is one."""
        self.gap, self.looked = 0.0, time.perf_counter()
        self.polls, self.polls_between, self.agreed_at = 0, 1, time.perf_counter()
        self.came = 0.0
        """Time of the first signal, by the monotonic clock; 0 if none has come."""
        self.restore: dict[int, object] = {}
        self.pipe: tuple[int, int] | None = None

    # --- signals ---------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Handle the signals until the end of the block. Does nothing outside the main thread."""
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
        """Do nothing. Python writes a signal's number to the pipe only if a handler is set."""

    def _watch(self, pipe: int) -> None:
        """Wait for signals: the interpreter writes the number of each into the pipe."""
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
        """Record the duration of a save."""
        self.save_seconds = seconds

    def paused(self) -> None:
        """Exclude the time since the last look at the clock from `gap`: it was not training."""
        self.looked = time.perf_counter()

    @property
    def room(self) -> float:
        """Seconds before the limit at which to stop: two saves, because one may be in progress;
        twice the time between two looks at the clock; and SPARE."""
        return 2 * self.save_seconds + 2 * self.gap + SPARE

    def _look_at_the_clock(self) -> None:
        now = time.perf_counter()
        gap, self.looked = now - self.looked, now
        # A long gap, such as a first step with its compilation, decays over the next ones.
        self.gap = max(gap, self.gap - gap / 10)
        if not self.limit or self.reason:
            return
        if process_age() - self.since + self.room >= seconds_of(self.limit):
            self.reason, self.out_of_time = f"train.max_time: {self.limit}", True

    # --- asking ----------------------------------------------------------------------------------

    @property
    def asked(self) -> bool:
        """True if this rank was asked to stop."""
        self._look_at_the_clock()
        return bool(self.reason)

    def agree(self) -> bool:
        """Return whether any rank was asked to stop. Every rank must call it, because each waits
        for the others."""
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
        """Return whether any rank was asked to stop, by the latest agreement.

        Several ranks agree only about every BETWEEN_AGREEMENTS seconds, after `polls_between`
        calls. Every rank must call it equally often.
        """
        self.polls += 1
        alone = self.ranks is None or self.ranks.world_size == 1
        if alone or self.polls >= self.polls_between:
            return self.agree()
        self._look_at_the_clock()
        return self.agreed

    def check(self) -> None:
        """Raise Stopped if `poll` returns True. Every rank must call it equally often."""
        if self.poll():
            raise Stopped

    def after(self, step: int) -> None:
        """Raise Stopped if `step` is `after_step`."""
        if step == self.after_step:
            raise Stopped

    def check_here(self) -> None:
        """Raise Stopped if this rank was asked to stop, without asking the other ranks."""
        if self.asked:
            raise Stopped

    def until_asked(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; raise Stopped before an item if this rank was asked to stop."""
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
        """First signal received; None before it."""
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
    def can_be_given_up(self) -> Generator[None]:
        """Raise CutShort in this block on a signal. Code outside such blocks is never interrupted,
        so that files stay complete."""
        self.gives_up = True
        try:
            if self.signal is not None:
                raise CutShort
            yield
        finally:
            self.gives_up = False
