"""TensorBoard and Weights & Biases, fed with the events that metrics.jsonl and samples.jsonl keep.

    StepMetrics ── train/loss, train/mfu, …          Evaluation ── validation/loss, …
    Sample ─────── sample/PROMPT

Both are optional dependencies. Neither can delete what it received, while a killed run repeats some
steps. TensorBoard is told to purge those steps; Weights & Biases does not receive them a second
time.
"""

import html
import importlib
import importlib.util
import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, assert_never

from pretrain_cli.engine.runs import events
from pretrain_cli.engine.runs.events import Emit, Evaluation, Event, Notice, Sample, StepMetrics
from pretrain_cli.engine.runs.sinks import Sink
from pretrain_cli.errors import ConfigError

GROUPS: dict[type, str] = {StepMetrics: "train", Evaluation: "validation", Sample: "sample"}


class Tracker(ABC):
    """Sink for a tracker: passes on step metrics, evaluations and samples."""

    def take(self, event: Event) -> None:
        match event:
            case StepMetrics() | Evaluation():
                self.write_numbers(event)
            case Sample():
                self.write_sample(event)
            case events.Notice() | events.Started() | events.Profiled() | events.Finished():
                pass
            case events.Skipped() | events.RolledBack() | events.Saved() | events.Unsaved():
                pass
            case _:
                assert_never(event)

    @abstractmethod
    def write_numbers(self, event: StepMetrics | Evaluation) -> None: ...

    @abstractmethod
    def write_sample(self, event: Sample) -> None: ...

    @abstractmethod
    def flush(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a requested tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.log: '{name}' is a package that is not installed; "
                f"pip install 'pretrain[{name}]', or leave it out"
            )


class TrackerStart(NamedTuple):
    """Facts that a tracker gets when a process of a run starts."""

    run: Path
    settings: dict[str, Any]
    """Settings of the run, resolved."""
    emit: Emit
    step: int
    """Steps that earlier processes have taken."""


def open_trackers(
    names: Sequence[str], run: Path, settings: dict[str, Any], emit: Emit, *, step: int
) -> list[Sink]:
    """Open the requested trackers for a run that continues from this step."""
    start = TrackerStart(run, settings, emit, step)
    return [TRACKERS[name](start) for name in names]


def numbers(event: StepMetrics | Evaluation) -> dict[str, float]:
    """Return an event's numbers by group and name: train/loss, validation/sources/data/web/loss."""
    found: dict[str, float] = {}

    def gather(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                gather(f"{prefix}/{name}", value)
            elif name not in ("step", "time") and isinstance(value, int | float):
                found[f"{prefix}/{name}"] = value

    gather(GROUPS[type(event)], asdict(event))
    return found


class TensorBoard(Tracker):
    """`tensorboard --logdir RUN`: event files in RUN/tensorboard."""

    def __init__(self, start: TrackerStart) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # hides an earlier process's events after `step`: these steps run again
        self.writer = SummaryWriter(str(start.run / "tensorboard"), purge_step=start.step + 1)

    def write_numbers(self, event: StepMetrics | Evaluation) -> None:
        for name, value in numbers(event).items():
            self.writer.add_scalar(name, value, event.step, walltime=event.time)

    def write_sample(self, event: Sample) -> None:
        text = f"    {event.prompt}{event.text}".replace("\n", "\n    ")  # indented: shown verbatim
        self.writer.add_text(f"sample/{event.prompt or 'no prompt'}", text, event.step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Tracker):
    """One W&B run for all processes of a training run; its id is kept in RUN/wandb.json. With
    WANDB_MODE=offline the data stays in RUN/wandb for a later `wandb sync`."""

    def __init__(self, start: TrackerStart) -> None:
        run = start.run
        wandb: Any = importlib.import_module("wandb")
        self.wandb = wandb
        self.path = run / "wandb.json"
        kept = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.id: str = kept.get("id") or secrets.token_hex(4)
        self.sent: dict[str, int] = kept.get("sent", {})
        self.before = dict(self.sent)
        """The last step of each group that earlier processes sent."""
        try:
            self.run = wandb.init(
                project="pretrain",
                name=run.name,
                id=self.id,
                resume="allow",
                dir=str(run),
                config=start.settings,
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            said = " ".join(str(error).split())
            raise ConfigError(
                f"train.log: wandb can't begin ({said}); run 'wandb login', or set "
                "WANDB_MODE=offline"
            ) from None
        self._keep()
        self.run.define_metric("*", step_metric="step")
        start.emit(Notice(f"Weights & Biases: {self.run.url or self.run.dir}"))

    def write_numbers(self, event: StepMetrics | Evaluation) -> None:
        self._send(event, numbers(event))

    def write_sample(self, event: Sample) -> None:
        text = f"<pre>{html.escape(event.prompt + event.text)}</pre>"
        self._send(event, {f"sample/{event.prompt or 'no prompt'}": self.wandb.Html(text)})

    def _send(self, event: StepMetrics | Evaluation | Sample, values: dict[str, Any]) -> None:
        """Send values of a step, unless an earlier process has sent them."""
        group = GROUPS[type(event)]
        if event.step <= self.before.get(group, -1):
            return
        self.run.log({"step": event.step, **values})
        self.sent[group] = event.step
        self._keep()

    def _keep(self) -> None:
        """Write the id to a temporary file and rename it. Not flushed: called for every line."""
        staging = self.path.with_name(".wandb.json.partial")
        staging.write_text(json.dumps({"id": self.id, "sent": self.sent}) + "\n")
        staging.replace(self.path)

    def flush(self) -> None:
        """Do nothing: W&B's own process writes at once."""

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[TrackerStart], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
"""Trackers by the name of the package that each needs, as in train.log."""
