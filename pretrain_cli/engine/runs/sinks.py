"""Sinks: everything that takes a run's events.

    training loop ── emit(event) ──> metrics.jsonl
                                 ──> samples.jsonl
                                 ──> TensorBoard, Weights & Biases
                                 ──> the caller: display, notebook

Events go one way. A sink that fails is named in one notice and gets nothing further; training
continues. An exception of the caller's own `emit` reaches the caller.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

from pretrain_cli.engine.runs.events import Emit, Event, Notice


class Sink(Protocol):
    """Takes the events of a run and keeps those that concern it."""

    def take(self, event: Event) -> None: ...

    def flush(self) -> None:
        """Write out what was taken. Called before a checkpoint that counts on it."""
        ...

    def close(self) -> None: ...


class Sinks:
    """Passes each event to every sink, then to the caller."""

    def __init__(self, caller: Emit) -> None:
        self.caller = caller
        self.sinks: list[Sink] = []
        self.remarks: list[str] = []
        """Notices of the sinks themselves. They reach the caller once every sink has been asked, so
        that an exception of the caller is not taken for a sink's."""

    def emit(self, event: Event) -> None:
        self._for_each(lambda sink: sink.take(event))
        self.caller(event)

    def flush(self) -> None:
        self._for_each(lambda sink: sink.flush())

    def close(self) -> None:
        sinks, self.sinks = self.sinks, []
        self._for_each(lambda sink: sink.close(), sinks)

    def _for_each(self, do: Callable[[Sink], None], sinks: Sequence[Sink] | None = None) -> None:
        """Call `do` with each sink. Close and drop a sink that fails: a run doesn't depend on any
        of them."""
        for sink in list(self.sinks) if sinks is None else sinks:
            try:
                do(sink)
            except Exception as error:
                self.sinks = [other for other in self.sinks if other is not sink]
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                name = type(sink).__name__
                self.remarks.append(f"{name}: {reason}; it gets no further events of this run")
                with contextlib.suppress(Exception):
                    sink.close()
        while self.remarks:
            self.caller(Notice(self.remarks.pop(0)))
