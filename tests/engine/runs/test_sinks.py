"""Sinks: every event reaches every sink; a sink that fails stops neither the others nor the run."""

import pytest

from pretrain_cli.engine.runs.events import Finished, Notice
from pretrain_cli.engine.runs.sinks import Sinks

FIRST, SECOND = Notice("first"), Notice("second")


class Recording:
    """Sink that records what it is asked to do, and fails at an event, at `flush` or at `close`."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def take(self, event):
        self._record(event)

    def flush(self):
        self._record("flush")

    def close(self):
        self._record("close")

    def _record(self, call):
        self.calls.append(call)
        if call == self.fails_at:
            raise ValueError("the server is away")


def sinks_of(*given):
    shown = []
    sinks = Sinks(shown.append)
    sinks.sinks = list(given)
    return sinks, shown


def test_every_sink_and_the_caller_get_every_event_in_order():
    one, other = Recording(), Recording()
    sinks, shown = sinks_of(one, other)
    for event in (FIRST, SECOND):
        sinks.emit(event)
    sinks.flush()
    sinks.close()
    assert one.calls == other.calls == [FIRST, SECOND, "flush", "close"]
    assert shown == [FIRST, SECOND]


@pytest.mark.parametrize("fails_at", [FIRST, "flush", "close"])
def test_a_failing_sink_is_named_once_and_dropped(fails_at):
    broken, other = Recording(fails_at), Recording()
    sinks, shown = sinks_of(broken, other)
    sinks.emit(FIRST)
    sinks.flush()
    sinks.emit(SECOND)
    sinks.close()
    assert broken.calls[broken.calls.index(fails_at) :] == [fails_at, "close"]
    assert [call for call in other.calls if call != "flush"] == [FIRST, SECOND, "close"]
    told = [event.text for event in shown if event not in (FIRST, SECOND)]
    assert told == ["Recording: the server is away; it gets no further events of this run"]


def test_after_close_only_the_caller_gets_events(tmp_path):
    sink = Recording()
    sinks, shown = sinks_of(sink)
    sinks.close()
    finished = Finished(tmp_path, 1, 1, "done")
    sinks.emit(finished)
    assert (sink.calls, shown) == (["close"], [finished])


def test_an_exception_of_the_caller_is_raised():
    def interrupts(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks(interrupts).emit(FIRST)


def test_an_exception_at_a_sinks_notice_drops_no_sink():
    """A sink on a full disk says so, and the caller, such as a display on a closed pipe, raises."""

    class OnAFullDisk(Recording):
        def take(self, event):
            super().take(event)
            sinks.remarks.append("the disk is full")

    sink = OnAFullDisk()

    def interrupts(event):
        if event.text == "the disk is full":
            raise BrokenPipeError

    sinks = Sinks(interrupts)
    sinks.sinks = [sink]
    with pytest.raises(BrokenPipeError):
        sinks.emit(FIRST)
    assert sinks.sinks == [sink]


def test_an_error_without_a_text_is_named_by_its_type():
    class Silent(Recording):
        def take(self, event):
            raise TimeoutError

    sinks, shown = sinks_of(Silent())
    sinks.emit(FIRST)
    assert shown[0].text == "Silent: TimeoutError; it gets no further events of this run"
