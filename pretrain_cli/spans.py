"""Parts of a step, by name, for a profile."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

PREFIX = "pretrain: "


def span(name: str) -> AbstractContextManager[object]:
    """Record this block as a named part of the step. Costs nothing without a profiler."""
    profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    return _recorded(name) if profiled else nullcontext()


@contextmanager
def _recorded(name: str) -> Iterator[None]:
    """A GPU works behind the CPU, so while a profile is made each part waits for its own work."""
    _wait()
    with record_function(PREFIX + name):
        yield
        _wait()


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
