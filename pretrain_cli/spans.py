"""Named parts of a training step, for the profiler."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

PREFIX = "pretrain: "


def span(name: str) -> AbstractContextManager[object]:
    """Record this block as a named part of the step. Costs nothing without a profiler."""
    profiled = torch.autograd._profiler_enabled()  # pyright: ignore
    return _recorded(name) if profiled else nullcontext()


@contextmanager
def _recorded(name: str) -> Generator[None]:
    """Record a span. A GPU runs asynchronously, so synchronize before and after: then the span
    covers exactly its own GPU work."""
    _wait()
    with record_function(PREFIX + name):
        yield
        _wait()


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
