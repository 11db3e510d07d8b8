"""Call a function in a fresh process.

Precision modes, the allocator's state, the waiting policy of threads and the peak of memory are
process-wide, so they would leak from one measurement into the next. This module imports no torch,
because a fresh process sets its environment before torch is loaded.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, wait
from typing import TypeVar

from pretrain_cli.engine.runtime.stop import Stopped

T = TypeVar("T")
SECONDS_BETWEEN_POLLS = 0.2


def in_a_fresh_process(
    function: Callable[..., T], *arguments: object, stop: Callable[[], bool] | None = None
) -> T:
    """Return `function(*arguments)`, computed in a fresh process.

    The function must be defined at module level, because it is pickled by name. Ctrl-C kills the
    process. `stop` is polled while the function runs; when it returns True, the process is killed
    and Stopped is raised.
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
def _unheard_by_children() -> Generator[None]:
    """Block SIGINT in processes started here, so that only the parent handles Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
