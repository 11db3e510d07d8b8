"""What a run is written to as it goes on: metrics.jsonl, and the trackers that it asked for."""

from pathlib import Path

from pretrain_cli.engine.planning.plan import Plan, resolved
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runs.events import Emit, Event, Logged, MetricsFile, Notice, Started
from pretrain_cli.engine.runs.trackers import Tracker, have_each, open_trackers, track


class RunLog:
    """Open on the first rank alone; elsewhere nothing is written."""

    def __init__(self, plan: Plan, run: Path, emit: Emit, tell: Emit) -> None:
        """Notices of an output go to `report`, those of one that is left out to `tell` alone."""
        self.plan, self.run, self.emit, self.tell = plan, run, emit, tell
        self.metrics: MetricsFile | None = None
        self.trackers: list[Tracker] = []

    @property
    def before(self) -> tuple[int, float]:
        """What earlier processes of the run did; see MetricsFile."""
        return self.metrics.before if self.metrics else (0, 0.0)

    def open(self, state: State) -> None:
        """Without what is there beyond the state's step."""
        self.metrics = MetricsFile(
            self.run / "metrics.jsonl",
            lambda text: self.emit(Notice(text)),
            upto=state.step,
            rollbacks=state.rollbacks,
        )
        asked = resolved(self.plan).model_dump(mode="json")
        names = self.plan.settings.train.log if state.step < self.plan.steps else ()
        self.trackers = open_trackers(names, self.run, asked, self.emit, step=state.step)

    def begin(self, started: Started) -> None:
        if self.metrics:
            self.metrics.write(started)

    def take(self, event: Event) -> None:
        if self.metrics and isinstance(event, Logged):
            self.metrics.write(event)
        track(self.trackers, event, self.tell)

    def has_evaluated(self, step: int) -> bool:
        return self.metrics is not None and step in self.metrics.evaluated

    def flush(self) -> None:
        """What trackers hold, before a checkpoint counts on it."""
        have_each(self.trackers, lambda tracker: tracker.flush(), self.tell)

    def sync(self) -> None:
        """Onto the disk, what a checkpoint counts on."""
        if self.metrics:
            self.metrics.sync()

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
        have_each(self.trackers, lambda tracker: tracker.close(), self.tell)
