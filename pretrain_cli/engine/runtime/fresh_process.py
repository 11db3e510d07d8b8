"""A call in a process of its own.

Precision modes, the allocator's state, the behaviour of waiting threads and the peak of memory
belong to a process, and would leak from one measurement into the next. No torch here: a fresh
process sets its environment before torch is loaded.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from typing import TypeVar

from pretrain_cli.engine.runtime.stop import Stopped

T = TypeVar("T")
SECONDS_BETWEEN_POLLS = 0.2


def in_a_fresh_process(
    function: Callable[..., T], *arguments: object, stop: Callable[[], bool] | None = None
) -> T:
    """Return `function(*arguments)`, computed in a fresh process. The function is found by its name
    there, so it must be a module's own.

    Ctrl-C kills the process. So does `stop`, polled all the while, by returning True; Stopped is
    then raised.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
        try:
            with _unheard_by_children():
                called = process.submit(function, *arguments)
            while stop and not wait([called], timeout=SECONDS_BETWEEN_POLLS).done:
                if stop():
                    raise Stopped
            return called.result()
        except (KeyboardInterrupt, Stopped):
            for child in multiprocessing.active_children():
                child.kill()
            raise


@contextlib.contextmanager
def _unheard_by_children() -> Iterator[None]:
    """Start processes in this block without the terminal's Ctrl-C, which their parent handles."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
