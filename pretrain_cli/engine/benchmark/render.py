"""Render a record: rows for the terminal, Markdown, and a picture."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from textwrap import fill
from typing import Any

from pretrain_cli.errors import ConfigError
from pretrain_cli.units import amount, duration, size

COLUMNS = (
    "", "step", "from – to", "tokens/s", "×", "MFU", "conv.", "memory", "loss", "off", "start",
)  # fmt: skip
LEGEND = (
    "step: median, fastest and slowest of all rounds. ×: tokens/s over those of the arm it is "
    "compared with, round by round. MFU: by the exact mask; conv.: the conventional one, every "
    "token taken to see the whole sequence. memory: the peak in the steps that count. loss: after "
    "all steps, on the same tokens; off: from that of the arm it must equal. start: what the "
    "warm-up of the first round took beyond steady steps, compiling among it."
)


@dataclass(frozen=True)
class TableRow:
    group: str
    cells: tuple[str, ...]
    is_run: bool
    differs: bool


def rows(results: list[dict[str, Any]]) -> list[TableRow]:
    """Return a row for each arm."""
    return [_row(result) for result in results]


def remarks(results: list[dict[str, Any]]) -> list[str]:
    """Return the notes on single arms, those with differing results first."""
    said = [f"{r['arm']} {r['differs']}" for r in results if r["differs"]]
    for result in results:
        if result["kind"] == "forward only":
            said.append(f"{result['arm']}: {result['reason']}; its forward pass alone was timed")
    # print a note shared by several arms once
    notes = dict[str, list[str]]()
    for result in results:
        left_out = [f"not run: {result['reason']}"] if result["kind"] == "not run" else []
        for note in left_out + result["notes"]:
            notes.setdefault(note, []).append(result["arm"])
    return said + [f"{', '.join(arms)}: {note}" for note, arms in notes.items()]


def _row(result: dict[str, Any]) -> TableRow:
    figures, name, group = result["figures"], result["arm"], result["group"]
    if figures is None:
        shown = "not run" if result["kind"] == "not run" else "…"
        return TableRow(group, (name, shown, *[""] * (len(COLUMNS) - 2)), False, False)
    if result["kind"] == "forward only":
        name += " (forward only)"
    off, worth = figures["loss_difference"], figures["worth"]
    cells = (
        name,
        f"{figures['step_median'] * 1e3:,.0f} ms",
        f"{figures['step_fastest'] * 1e3:,.0f} – {figures['step_slowest'] * 1e3:,.0f}",
        f"{figures['tokens_per_second']:,.0f}",
        "" if worth is None else f"{worth:.2f}",
        f"{figures['mfu']:.1%}",
        f"{figures['mfu_conventional']:.1%}",
        size(figures["peak_memory"]),
        f"{figures['loss']:.4f}",
        "" if off is None else f"{off:.0e}" if off else "0",
        duration(figures["compile_time"]),
    )
    return TableRow(group, cells, True, bool(result["differs"]))


def to_markdown(record: dict[str, Any]) -> str:
    """Return the command, the machine, the table, and the notes on single arms."""
    first = record["results"][0]["workload"]
    commit = f", commit {record['commit']}" if record["commit"] else ""
    repeats = record["repeats"]
    cut = [f"Cut short by {record['cut_short']}.", ""] if record["cut_short"] else []
    lines = [
        "```sh",
        record["command"],
        "```",
        "",
        *cut,
        f"{first['name']}, {first['micro_batch_size']} × {first['seq_len']} tokens a step, "
        f"{repeats['rounds']} rounds of {repeats['warmup']} + {repeats['steps']} steps. "
        f"{record['machine']}, torch {record['torch']}, pretrain {record['pretrain']}{commit}. "
        + peaks(record),
        "",
        _line(COLUMNS),
        _line(("---", *["--:"] * (len(COLUMNS) - 1))),
    ]
    group = ""
    for row in rows(record["results"]):
        if row.group != group:
            group = row.group
            if group:
                lines.append(_line((f"*{group}*", *[""] * (len(COLUMNS) - 1))))
        cells = [f"**{cell}**" if row.differs and cell else cell for cell in row.cells]
        lines.append(_line(cells))
    lines += ["", LEGEND, *[f"- {said}" for said in remarks(record["results"])]]
    if record["ratios"]:
        lines += ["", _line(("pretrain beside", "tokens/s", "from – to", "memory"))]
        lines.append(_line(("---", "--:", "--:", "--:")))
        for ratio in record["ratios"]:
            lines.append(
                _line(
                    (
                        f"{ratio['ours']} / {ratio['arm']}",
                        f"{ratio['tokens_per_second']:.2f} ×",
                        f"{ratio['lowest']:.2f} – {ratio['highest']:.2f}",
                        f"{ratio['peak_memory']:.2f}",
                    )
                )
            )
    return "\n".join(lines) + "\n"


def peaks(record: dict[str, Any]) -> str:
    """Return a sentence with the peak FLOP/s that MFU refers to, for each type."""
    said = []
    for dtype, peak in record["peaks"].items():
        source = peak["source"]
        if peak["measured"] != peak["flops"]:
            source += f"; {peak['measured'] / 1e12:.3g} measured"
        said.append(f"{peak['flops'] / 1e12:.3g} TFLOP/s in {dtype} ({source})")
    return f"MFU of {', '.join(said)}." if said else ""


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


FORMATS = (".png", ".svg")
COLORS = {
    "": "#1f5fd0",
    "alone on": "#14804f",
    "all on but": "#856300",
    "as shipped": "#d4570a",
    "with our process settings": "#9735b8",
}
OTHER, GRAVE, FAINT = "#5457c4", "#c2182b", "#6b7480"
ROW_INCHES = 0.3
CHARACTERS = 150
"""Characters in a line of the footnote."""


def need_matplotlib(path: Path) -> None:
    """Raise ConfigError before measuring if the picture cannot be drawn."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--plot: {path.name} is neither .png nor .svg; name one of them")
    try:
        import_module("matplotlib")
    except ImportError:
        raise ConfigError(
            "--plot: matplotlib is not installed; pip install 'pretrain[plot]', or leave --plot out"
        ) from None


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the picture in the format given by the file's suffix."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    results = [result for result in record["results"] if result["figures"]]
    places = _places(results)
    height = 1.5 + ROW_INCHES * (max(places, default=0) + 1)
    figure = Figure(figsize=(11, height), layout="constrained")
    figure.suptitle(_title(record), fontsize=11, x=0.01, ha="left")
    rates, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for axes, title, shown in ((rates, "tokens/s", amount), (memory, "peak memory", size)):
        axes.set_title(title, size=10, loc="left")
        axes.xaxis.set_major_formatter(FuncFormatter(_ticks(shown)))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(labelsize=8, length=0)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.margins(x=0.2, y=0.02)
    for place, result in zip(places, results, strict=True):
        figures, color = result["figures"], COLORS.get(result["group"], OTHER)
        bar = {"color": color, "height": 0.68, "alpha": 0.85}
        if result["differs"]:
            bar |= {"facecolor": "white", "edgecolor": GRAVE, "hatch": "////"}
        tokens, rate = result["tokens_per_step"], figures["tokens_per_second"]
        slow, fast = (tokens / figures[name] for name in ("step_slowest", "step_fastest"))
        rates.barh(place, rate, **bar)
        rates.plot([slow, fast], [place, place], color="black", linewidth=1, solid_capstyle="butt")
        said = f" {rate:,.0f}"
        if figures["worth"] is not None:
            said += f"  ({figures['worth']:.2f} ×)"
        if result["differs"]:
            said += "  learns something else"
        rates.annotate(said, (max(fast, rate), place), va="center", size=8)
        memory.barh(place, figures["peak_memory"], **bar)
        memory.annotate(
            f" {size(figures['peak_memory'])}", (figures["peak_memory"], place), va="center", size=8
        )
    rates.set_yticks(places, [f"{result['arm']} " for result in results])
    rates.invert_yaxis()
    for tick, result in zip(rates.get_yticklabels(), results, strict=True):
        tick.set_parse_math(False)
        tick.set_color(GRAVE if result["differs"] else "black")
    figure.supxlabel(_footnote(record), fontsize=7.5, color=FAINT, x=0.01, ha="left")
    figure.savefig(path, dpi=140, format=path.suffix[1:])


def _places(results: list[dict[str, Any]]) -> list[float]:
    """Return the vertical position of each row, from the top, with a gap between groups."""
    places, place, group = [], 0.0, None
    for result in results:
        if group is not None and result["group"] != group:
            place += 0.5
        places.append(place)
        place, group = place + 1, result["group"]
    return places


def _title(record: dict[str, Any]) -> str:
    """Return a title from what all arms share."""
    workloads = [result["workload"] for result in record["results"]]
    models = {workload["name"] for workload in workloads}
    sizes = {f"{each['micro_batch_size']} × {each['seq_len']}" for each in workloads}
    shared = [*models] if len(models) == 1 else []
    shared += [f"{size} tokens a step" for size in sizes if len(sizes) == 1]
    cut = f", cut short by {record['cut_short']}" if record["cut_short"] else ""
    return f"{', '.join(shared) or 'Training steps'} on {record['machine']}{cut}"


def _footnote(record: dict[str, Any]) -> str:
    commit = f" {record['commit'][:9]}" if record["commit"] else ""
    return (
        f"{fill(record['command'], CHARACTERS)}\n"
        "Bars: median step; lines: slowest to fastest. "
        f"torch {record['torch']}, pretrain {record['pretrain']}{commit}"
    )


def _ticks(shown: Callable[[float], str]) -> Callable[[float, int], str]:
    """Return a function that labels the ticks of an axis as `shown` does."""

    def label(value: float, position: int) -> str:
        return shown(value)

    return label
