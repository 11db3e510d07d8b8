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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from pretrain_cli.engine.runs.events import Emit, Evaluation, Event, Notice, Sample, StepMetrics
from pretrain_cli.errors import ConfigError

GROUPS: dict[type, str] = {StepMetrics: "train", Evaluation: "validation", Sample: "sample"}


class Tracker(Protocol):
    def write(self, event: StepMetrics | Evaluation | Sample) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a requested tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.log: '{name}' is a package that is not installed; "
                f"pip install 'pretrain[{name}]', or leave it out"
            )


def open_trackers(
    names: Sequence[str], run: Path, settings: dict[str, Any], emit: Emit, *, step: int
) -> list[Tracker]:
    """Open the requested trackers for a run that continues from this step."""
    opened: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            opened.append(TensorBoard(run, step=step))
        else:
            opened.append(WeightsAndBiases(run, settings, emit))
    return opened


def track(trackers: list[Tracker], event: Event, emit: Emit) -> None:
    """Pass an event to each tracker that takes it."""
    if isinstance(event, StepMetrics | Evaluation | Sample):
        have_each(trackers, lambda tracker: tracker.write(event), emit)


def have_each(trackers: list[Tracker], do: Callable[[Tracker], None], emit: Emit) -> None:
    """Call `do` with each tracker. A tracker that fails because the disk is full is dropped from
    then on; the run does not depend on it."""
    for tracker in list(trackers):
        try:
            do(tracker)
        except OSError as error:
            trackers.remove(tracker)
            said = error.strerror or error
            emit(Notice(f"{type(tracker).__name__}: {said}; it gets no further events of this run"))


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


class TensorBoard:
    """`tensorboard --logdir RUN`: event files in RUN/tensorboard."""

    def __init__(self, run: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # hides an earlier process's events after `step`: these steps run again
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, event: StepMetrics | Evaluation | Sample) -> None:
        if isinstance(event, Sample):
            text = f"    {event.prompt}{event.text}".replace("\n", "\n    ")  # a code block
            self.writer.add_text(f"sample/{event.prompt or 'no prompt'}", text, event.step)
            return
        for name, value in numbers(event).items():
            self.writer.add_scalar(name, value, event.step, walltime=event.time)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One W&B run for all processes of a training run; its id is kept in RUN/wandb.json. With
    WANDB_MODE=offline the data stays in RUN/wandb for a later `wandb sync`."""

    def __init__(self, run: Path, settings: dict[str, Any], emit: Emit) -> None:
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
                config=settings,
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
        emit(Notice(f"Weights & Biases: {self.run.url or self.run.dir}"))

    def write(self, event: StepMetrics | Evaluation | Sample) -> None:
        group = GROUPS[type(event)]
        if event.step <= self.before.get(group, -1):
            return
        if isinstance(event, Sample):
            text = f"<pre>{html.escape(event.prompt + event.text)}</pre>"
            values = {f"sample/{event.prompt or 'no prompt'}": self.wandb.Html(text)}
        else:
            values = numbers(event)
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
