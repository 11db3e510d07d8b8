"""Read a run folder: curves, marks, samples and settings.

    run.yaml         the record, unchanged
    metrics.jsonl    step          a row of `steps`
                     evaluation    a row of `evaluations`
                     any other     a mark: start, skipped, rolled_back, saved, …
    samples.jsonl    samples

Every number in a row becomes a curve with that field's name, so fields of later versions appear
too. Every row has a position on three axes: step, tokens and time.
"""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml
from numpy.typing import NDArray

from pretrain_cli.engine.runs.run_yaml import RUN_YAML
from pretrain_cli.errors import CheckpointError

MetricsLine = dict[str, Any]
BUCKETS = 1500
"""Maximum points of a curve, about the width of a screen. A run of a million steps then takes half
a megabyte."""
MARKS = 300
"""Maximum marks of a kind drawn for a run. The run's card counts all of them."""
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
AXES = ("tokens", "time", "step")
"""Tokens seen; seconds of training; steps."""
PLACES = {"kind", "step", "tokens", "seconds", "time"}
"""Fields that locate a row, and are not curves."""
START = "start"
RESTARTED, NOT_FINITE = "restarted", "not finite"
Floats = NDArray[np.float64]


class Columns:
    """Rows as one column of numbers per field; NaN where a row lacks the field."""

    def __init__(self) -> None:
        self.rows = 0
        self.fields: dict[str, array[float]] = {}

    def append(self, numbers: dict[str, float]) -> None:
        for name in numbers.keys() - self.fields.keys():
            self.fields[name] = array("d", [math.nan]) * self.rows
        for name, column in self.fields.items():
            column.append(numbers.get(name, math.nan))
        self.rows += 1

    def arrays(self) -> dict[str, Floats]:
        return {name: np.array(column, dtype=np.float64) for name, column in self.fields.items()}


@dataclass(frozen=True)
class Curves:
    """Rows in file order: their positions, and their numbers."""

    axes: dict[str, Floats]
    values: dict[str, Floats]

    def __len__(self) -> int:
        return len(self.axes["step"])

    def has(self, name: str) -> bool:
        return name in self.values and bool(np.isfinite(self.values[name]).any())


@dataclass(frozen=True)
class Mark:
    """An event at a step."""

    kind: str
    details: MetricsLine
    axes: dict[str, float]


@dataclass(frozen=True)
class Sample:
    step: int
    prompt: str
    text: str


@dataclass
class History:
    """Content of a run folder."""

    folder: Path
    name: str
    record: dict[str, Any]
    steps: Curves
    evaluations: Curves
    marks: list[Mark]
    samples: list[Sample]
    source_tokens: dict[str, float]
    """Tokens seen of each dataset at the last step, if there are several."""
    notes: list[str] = field(default_factory=list)
    """Notes on lines that could not be read."""

    def marked(self, kind: str) -> list[Mark]:
        return [mark for mark in self.marks if mark.kind == kind]

    def section(self, *path: str) -> dict[str, Any]:
        """Return a mapping of run.yaml; empty if it has none of this name."""
        found: Any = self.record
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}


def check_run(folder: Path) -> None:
    """Raise CheckpointError for a folder that is not a run."""
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such run; name the folder of a run, as runs/NAME")
    if not (folder / RUN_YAML).is_file():
        raise CheckpointError(f"{folder}: not a run (no {RUN_YAML}); name the folder of a run")


def read_history(folder: Path) -> History:
    """Read a run from its folder. Raises CheckpointError if it is not one."""
    check_run(folder)
    metrics, samples = Rows(folder / METRICS), Rows(folder / SAMPLES)
    reader = _Reader()
    for row in metrics:
        reader.read(row)
    history = History(
        folder=folder,
        name=folder.resolve().name,
        record=_read_record(folder / RUN_YAML),
        steps=reader.steps_read(),
        evaluations=reader.evaluations_read(),
        marks=reader.marks_read(),
        samples=[
            Sample(int(row["step"]), str(row.get("prompt", "")), row["text"])
            for row in samples
            if isinstance(row.get("text"), str)
        ],
        source_tokens=reader.source_tokens,
    )
    history.notes += [note for note in (metrics.note, samples.note) if note]
    return history


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        record = None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: damaged; copy it back from a backup")
    return record


class _Reader:
    """Reads the rows of metrics.jsonl in order."""

    def __init__(self) -> None:
        self.steps, self.evaluations = Columns(), Columns()
        self.marks: list[tuple[str, float, int, MetricsLine]] = []
        self.evaluated: list[tuple[float, int]] = []
        """Step, and how many step rows came before: rolled back, a run has a step twice."""
        self.source_tokens: dict[str, float] = {}
        self.start: MetricsLine = {}
        """The last line of kind start; of a restart only what is another now is told."""
        self.time = _Clock()

    def read(self, row: MetricsLine) -> None:
        kind, step = str(row.get("kind")), float(row["step"])
        if kind == "step":
            self._read_step(row, step)
        elif kind == "evaluation":
            self.evaluated.append((step, self.steps.rows))
            self.evaluations.append(self._numbers(row, step) | _by_source(row))
        else:
            first = not self.marks and not self.steps.rows and step == 0
            if kind == START:
                kind = START if first else RESTARTED
                before, self.start = self.start, row
                row = {n: v for n, v in row.items() if before.get(n, v) != v and "peak" not in n}
            self._mark(kind, step, row)

    def _read_step(self, row: MetricsLine, step: float) -> None:
        seconds = float(given) if is_number(given := row.get("seconds")) else math.nan
        if seconds < self.time.seconds:  # the clock restarted, but the file has no start row
            self.time.restart()
            self._mark(RESTARTED, float(self._last("step")), {"seen by": "its clock began again"})
        places = {"step": step, "time": self.time.at(seconds)}
        if is_number(tokens := row.get("tokens")):
            places["tokens"] = float(tokens)
        if isinstance(sources := row.get("sources"), dict):
            self.source_tokens = {n: float(v) for n, v in sources.items() if is_number(v)}
        numbers = self._numbers(row, step)
        self.steps.append({f"@{axis}": place for axis, place in places.items()} | numbers)

    def _last(self, axis: str) -> float:
        return self.steps.fields[f"@{axis}"][-1]

    def _mark(self, kind: str, step: float, details: MetricsLine) -> None:
        details = {name: value for name, value in details.items() if name not in ("kind", "step")}
        self.marks.append((kind, step, self.steps.rows, details))

    def _numbers(self, row: MetricsLine, step: float) -> dict[str, float]:
        """Return a row's numbers. Those that are not finite become marks, and gaps in their
        curves."""
        found = {}
        for name, value in row.items():
            if name in PLACES or not is_number(value):
                continue
            if math.isfinite(value):
                found[name] = float(value)
            else:
                self._mark(NOT_FINITE, step, {name: str(value)})
        return found

    def steps_read(self) -> Curves:
        arrays = self.steps.arrays()
        nowhere = np.full(self.steps.rows, np.nan)
        axes = {axis: arrays.get(f"@{axis}", nowhere) for axis in AXES}
        return Curves(axes, {name: v for name, v in arrays.items() if not name.startswith("@")})

    def evaluations_read(self) -> Curves:
        steps = self.steps_read()
        places = [_place(steps, step, before) for step, before in self.evaluated]
        axes = {axis: np.array([place[axis] for place in places], float) for axis in AXES}
        return Curves(axes, self.evaluations.arrays())

    def marks_read(self) -> list[Mark]:
        steps = self.steps_read()
        return [
            Mark(kind, details, _place(steps, step, before))
            for kind, step, before, details in self.marks
        ]


class _Clock:
    """Seconds of training of the run. Runs of the first version count from zero in each process;
    these are summed."""

    def __init__(self) -> None:
        self.before = 0.0
        self.seconds = 0.0

    def at(self, seconds: float) -> float:
        if math.isfinite(seconds):
            self.seconds = seconds
        return self.before + seconds

    def restart(self) -> None:
        self.before += self.seconds
        self.seconds = 0.0


def _by_source(row: MetricsLine) -> dict[str, float]:
    """Flatten `sources: {web: {loss: 2.0}}` to `loss of web`."""
    sources = row.get("sources")
    return {
        f"{name} of {source}": float(value)
        for source, numbers in (sources.items() if isinstance(sources, dict) else ())
        for name, value in (numbers.items() if isinstance(numbers, dict) else ())
        if name not in PLACES and is_number(value) and math.isfinite(value)
    }


def _place(steps: Curves, step: float, before: int) -> dict[str, float]:
    """Return a step's place on every axis, between the rows before and after it in the file."""
    last = {axis: float(steps.axes[axis][before - 1]) if before else 0.0 for axis in AXES}
    following = {axis: float(v[before]) if before < len(v) else math.nan for axis, v in
                 steps.axes.items()}  # fmt: skip
    if following["step"] > last["step"]:
        share = (step - last["step"]) / (following["step"] - last["step"])
        return {axis: last[axis] + share * (following[axis] - last[axis]) for axis in AXES} | {
            "step": step
        }
    share = step / last["step"] if last["step"] else 0.0 if step == 0 else math.nan
    return {axis: last[axis] * share for axis in AXES} | {"step": step}


class Rows:
    """Yields the complete rows of a .jsonl file that have a step; counts the others."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0

    def __iter__(self) -> Iterator[MetricsLine]:
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):  # not JSON, or not UTF-8
                    row = None
                if isinstance(row, dict) and is_number(row.get("step")) and row["step"] >= 0:
                    yield row
                else:
                    self.damaged += 1

    @property
    def note(self) -> str | None:
        """Note on damaged lines; None if there are none."""
        if not self.damaged:
            return None
        lines = "1 line is" if self.damaged == 1 else f"{self.damaged:,} lines are"
        return f"{self.path.name}: {lines} damaged and left out"


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a JSON value is a number that a float holds. NaN and Infinity are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**1000


@dataclass(frozen=True)
class Thinned:
    """Curves as drawn. Where rows were merged, values are means, and `low` and `high` their
    bounds."""

    curves: Curves
    rows_together: int
    low: dict[str, Floats]
    high: dict[str, Floats]


def thin(curves: Curves, buckets: int = BUCKETS) -> Thinned:
    """Reduce curves to at most this many points; shorter ones are unchanged."""
    rows = len(curves)
    if rows <= buckets:
        return Thinned(curves, 1, {}, {})
    starts = np.arange(buckets) * rows // buckets
    values = curves.values
    return Thinned(
        Curves(
            {name: _means(column, starts) for name, column in curves.axes.items()},
            {name: _means(column, starts) for name, column in values.items()},
        ),
        -(-rows // buckets),
        {name: np.fmin.reduceat(column, starts) for name, column in values.items()},
        {name: np.fmax.reduceat(column, starts) for name, column in values.items()},
    )


def _means(column: Floats, starts: np.ndarray) -> Floats:
    """Return the mean of each bucket's numbers; NaN for an empty bucket."""
    known = np.isfinite(column)
    sums = np.add.reduceat(np.where(known, column, 0.0), starts)
    counts = np.add.reduceat(known.astype(float), starts)
    return np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)


def some(marks: list[Mark]) -> list[Mark]:
    """Return at most `count` items, evenly spaced from first to last."""
    if len(marks) <= MARKS:
        return marks
    return [marks[int(place)] for place in np.linspace(0, len(marks) - 1, MARKS)]
