"""Charts: group curves into charts, assign colors, and list curves that runs lack.

With one run, each curve of a chart has a color. With several, each run has a color and each curve a
dash pattern.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pretrain_cli.engine.report.history import Curves, History

Table = Literal["steps", "evaluations"]
Unit = Literal["number", "amount", "bytes", "share", "seconds", "tiny"]


@dataclass(frozen=True)
class Curve:
    """A field of a run's rows, and how to draw it."""

    run: int
    table: Table
    field: str
    what: str
    """Name of the curve among a run's curves in this chart; empty if it is the only one."""
    color: int
    dash: int


@dataclass(frozen=True)
class Chart:
    title: str
    unit: Unit
    about: str
    """A sentence that explains the number."""
    curves: tuple[Curve, ...]
    missing: str
    """Note on missing curves; empty if every run has them."""
    main: bool = False


@dataclass(frozen=True)
class _Kind:
    """A chart of certain fields of one table."""

    title: str
    unit: Unit
    about: str
    fields: dict[str, str]
    """Field to the curve's label among others."""
    expected: bool = False
    """True if its absence is worth a note."""


KINDS: dict[Table, list[_Kind]] = {
    "evaluations": [
        _Kind("Bits per byte", "number", "Of the validation text.", {"bits_per_byte": ""}, True),
        _Kind("Perplexity", "number", "Of the validation tokens.", {"perplexity": ""}),
    ],
    "steps": [
        _Kind("Learning rate", "tiny", "By the schedule.", {"learning_rate": ""}, True),
        _Kind(
            "Gradient norm", "number", "Of all gradients, before clipping.", {"gradient_norm": ""},
            True,
        ),
        _Kind(
            "Throughput", "amount", "Tokens a second, on all ranks.",
            {"tokens_per_second": "since the line before", "run_tokens_per_second": "of the run"},
            True,
        ),
        _Kind(
            "Memory", "bytes", "The peak so far. On a GPU, reserved memory is what runs out.",
            {"memory": "used", "memory_reserved": "reserved"}, True,
        ),
        _Kind(
            "MFU", "share", "Model FLOPs as a share of the device's peak.",
            {"mfu": "exact mask", "mfu_conventional": "conventional"},
        ),
        _Kind("Data wait", "seconds", "A step's wait for its batch.", {"data_wait": ""}),
        _Kind("Save stall", "seconds", "Of training, for saving.", {"save_stall": ""}),
        _Kind(
            "Evaluation time", "seconds", "Evaluating and sampling.",
            {"evaluation_time": ""},
        ),
    ],
}  # fmt: skip
SAID_ELSEWHERE = {"split_tokens", "evaluation_time"}
"""Fields of an evaluation that get no chart: the size of the split, and a time that the next step's
line contains."""
_FROM_SOURCE = "loss of "


def build_charts(histories: list[History]) -> list[Chart]:
    """Return the loss chart first, then the charts that every run should have, then other fields of
    the rows."""
    charts = [_loss(histories)]
    by_source = _fields(histories, "evaluations", _FROM_SOURCE)
    if by_source:
        charts.append(_by_source(histories, by_source))
    for table, kinds in KINDS.items():
        named = {"loss"}.union(*(kind.fields for kind in kinds))
        others = [
            _Kind(name.replace("_", " ").capitalize(), "number", "", {name: ""})
            for name in _fields(histories, table)
            if name not in named
            and " of " not in name
            and not (table == "evaluations" and name in SAID_ELSEWHERE)
        ]
        found = [(kind, _chart(histories, table, kind)) for kind in kinds + others]
        charts += [chart for kind, chart in found if chart.curves or kind.expected]
    return charts


def _table(history: History, table: Table) -> Curves:
    return history.steps if table == "steps" else history.evaluations


def _fields(histories: list[History], table: Table, prefix: str = "") -> list[str]:
    """Return the fields for which some run has numbers, in the order of the rows."""
    curves = [_table(history, table) for history in histories]
    names = dict.fromkeys(name for one in curves for name in one.values if one.has(name))
    return [name for name in names if name.startswith(prefix)]


def _curves(
    histories: list[History], wanted: Iterable[tuple[Table, str, str]]
) -> tuple[Curve, ...]:
    """Return the curves of (table, field, what) that runs have, with colours and dashes."""
    several = len(histories) > 1
    return tuple(
        Curve(
            run=run,
            table=table,
            field=field,
            what=what,
            color=run if several else number,
            dash=number if several else 0,
        )
        for number, (table, field, what) in enumerate(wanted)
        for run, history in enumerate(histories)
        if _table(history, table).has(field)
    )


def _missing(histories: list[History], table: Table, field: str, what: str) -> str:
    """Return a note on the runs without this curve; empty if all have it."""
    without = [history.name for history in histories if not _table(history, table).has(field)]
    if not without:
        return ""
    if len(without) == len(histories):
        return f"metrics.jsonl has no {what}."
    return f"No {what}: {', '.join(without)}."


def _loss(histories: list[History]) -> Chart:
    wanted: list[tuple[Table, str, str]] = [
        ("steps", "loss", "training"),
        ("evaluations", "loss", "validation"),
    ]
    missing = [_missing(histories, table, field, f"{label} loss") for table, field, label in wanted]
    return Chart(
        "Loss",
        "number",
        "Nats a token. Training: the mean over all tokens of the step. Validation: over every "
        "token held out.",
        _curves(histories, wanted),
        " ".join(filter(None, missing)),
        main=True,
    )


def _by_source(histories: list[History], fields: list[str]) -> Chart:
    wanted: list[tuple[Table, str, str]] = [
        ("evaluations", field, field.removeprefix(_FROM_SOURCE)) for field in fields
    ]
    return Chart(
        "Validation loss by source",
        "number",
        "Nats a token, of the tokens held out of each dataset.",
        _curves(histories, wanted),
        "",
    )


def _chart(histories: list[History], table: Table, kind: _Kind) -> Chart:
    alone = len(kind.fields) == 1
    wanted: list[tuple[Table, str, str]] = [
        (table, field, "" if alone else what) for field, what in kind.fields.items()
    ]
    name = kind.title if kind.title.isupper() else kind.title.lower()
    missing = _missing(histories, table, next(iter(kind.fields)), name)
    return Chart(kind.title, kind.unit, kind.about, _curves(histories, wanted), missing)
