"""A benchmark asked to stop by a signal: what is under way is given up, what is there is shown and
written, marked as cut short, and the exit code is 128 and the signal's number.

No torch here.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Self

from pretrain_cli.engine.runtime.stop import SAME_REQUEST, SIGNALS


class CutShort(KeyboardInterrupt):
    """The current measurement is abandoned."""


class Interruption:
    """Takes signals, from the beginning to the end of the block, and ends it quietly."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first that came."""
        self.came = 0.0
        self.gives_up = False
        self.restore: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.restore = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> bool:
        for number, handler in self.restore.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        return kind is CutShort

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self.came > SAME_REQUEST:
                os._exit(128 + number)
            return
        self.signal, self.came = signal.Signals(number), time.monotonic()
        if self.gives_up:
            raise CutShort

    @contextlib.contextmanager
    def can_be_given_up(self) -> Iterator[None]:
        """In this block a signal raises CutShort. Elsewhere nothing is left half written."""
        self.gives_up = True
        try:
            if self.signal is not None:
                raise CutShort
            yield
        finally:
            self.gives_up = False


@contextlib.contextmanager
def unheard_by_children() -> Iterator[None]:
    """A process that is started in this block doesn't get the terminal's Ctrl-C, which is for the
    one that ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
