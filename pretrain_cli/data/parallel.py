"""Map a function over items in forked processes, keeping their order.

Forked processes share what the function needs without pickling it, such as memory-mapped shards.
Items and results are pickled. Each process has a pipe of its own, whose end it sees when the parent
is gone, however it ended.
"""

import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import cycle
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from pretrain_cli.errors import DataError

CAN_FORK = sys.platform == "linux"
"""A fork isn't safe elsewhere; there, one process does it all."""
IN_FLIGHT_PER_WORKER = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # missing on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result]:
    """Yield work(item) for each item, in order. With one worker, this process does it."""
    if workers <= 1 or not CAN_FORK:
        yield from map(work, items)
        return
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    pending: deque[Connection] = deque()
    try:
        for _ in range(workers):
            processes.append(_start(work, pipes))
        for item, pipe in zip(items, cycle(pipes), strict=False):
            if len(pending) == IN_FLIGHT_PER_WORKER * workers:
                yield _result(pending.popleft())
            pipe.send(item)
            pending.append(pipe)
        while pending:
            yield _result(pending.popleft())
    except (EOFError, ConnectionError):
        raise DataError(
            "a process was ended from outside, perhaps because memory ran out; run the command "
            "again"
        ) from None
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.terminate()
            process.join()


def _start(work: Callable[[Item], Result], pipes: list[Connection]) -> BaseProcess:
    """Start a process, and add this process's end of its pipe to `pipes`."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    pipes.append(ours)
    process = context.Process(target=_serve, args=(work, theirs, list(pipes)), daemon=True)
    with warnings.catch_warnings():
        # warning about forking a process with threads: workers use none of their locks
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    return process


def _serve(
    work: Callable[[Item], Result], pipe: Connection, parents_ends: Iterable[Connection]
) -> None:
    """Answer items with results until the parent closes the pipe. An exception is a result too."""
    for end in parents_ends:
        end.close()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the parent handles them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        while True:
            item = pipe.recv()
            try:
                result = True, work(item)
            except Exception as error:
                result = False, error
            pipe.send(result)
    except (EOFError, ConnectionError):
        pass


def _result(pipe: Connection) -> Any:
    succeeded, result = pipe.recv()
    if not succeeded:
        raise result
    return result
