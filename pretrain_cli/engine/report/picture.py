"""The curves as one PNG, by matplotlib: loss over tokens and over time, and related curves."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from pretrain_cli.engine.report.charts import Chart, Unit, build_charts
from pretrain_cli.engine.report.history import RESTARTED, History, some, thin
from pretrain_cli.engine.report.tables import kinds
from pretrain_cli.units import amount, duration, size

COLORS = ["#1f5fd0", "#d4570a", "#14804f", "#9735b8", "#bd1f5b", "#0a7c90", "#856300", "#5457c4"]
DASHES = ("-", "--", ":", "-.")
BELOW = ("Learning rate", "Gradient norm", "Throughput", "Memory")
TIMES = (
    0.1,
    0.5,
    1,
    2,
    5,
    10,
    30,
    60,
    120,
    300,
    600,
    1800,
    3600,
    7200,
    21600,
    43200,
    86400,
    432000,
)
"""Tick spacings of a time axis, in seconds."""
GRAVE, CALM = "#c2182b", "#6b7480"


def draw(histories: list[History], path: Path) -> None:
    """Write the picture. Curves are thinned as on the page."""
    charts = {chart.title: chart for chart in build_charts(histories)}
    figure = Figure(figsize=(13, 8.2), layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=(1.5, 1))
    _draw_chart(figure.add_subplot(grid[0, :2]), histories, charts["Loss"], "tokens")
    _draw_chart(figure.add_subplot(grid[0, 2:]), histories, charts["Loss"], "time")
    for place, title in enumerate(BELOW):
        _draw_chart(figure.add_subplot(grid[1, place]), histories, charts[title], "tokens")
    with warnings.catch_warnings():
        # matplotlib draws letters missing from its font as boxes; no warning is needed
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=130, format="png")


def _draw_chart(axes: Axes, histories: list[History], chart: Chart, axis: str) -> None:
    is_time = axis == "time"
    axes.set_title(f"{chart.title} over {'training time' if is_time else 'tokens seen'}", size=10)
    axes.xaxis.set_major_formatter(axis_format(duration if is_time else amount))
    axes.yaxis.set_major_formatter(axis_format(_SHOWN[chart.unit]))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for curve in chart.curves:
        history = histories[curve.run]
        thinned = thin(history.steps if curve.table == "steps" else history.evaluations)
        x, y = thinned.curves.axes[axis], thinned.curves.values[curve.field]
        color, held_out = COLORS[curve.color % len(COLORS)], curve.table == "evaluations"
        if thinned.low:
            low, high = thinned.low[curve.field], thinned.high[curve.field]
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        known = np.isfinite(y) if held_out else slice(None)  # keep NaN gaps in training curves
        axes.plot(
            x[known], y[known], color=color, linestyle=DASHES[curve.dash % len(DASHES)],
            linewidth=1.3, marker="o" if held_out or len(x) == 1 else "", markersize=4,
        )  # fmt: skip
    _draw_marks(axes, histories, axis)
    if is_time:
        _, longest = axes.get_xlim()
        axes.xaxis.set_major_locator(
            MultipleLocator(next((t for t in TIMES if longest / t <= 7), longest))
        )
    if any(curve.what for curve in chart.curves):
        # leading space: matplotlib hides labels that begin with an underscore
        names = [(histories[curve.run].name, curve.what) for curve in chart.curves]
        labels = [
            f" {what}" if len(histories) == 1 else f" {name} · {what}" for name, what in names
        ]
        lines = [line for line in axes.lines if line.get_gid() != "mark"]
        legend = axes.legend(
            lines, labels, loc="upper right", fontsize=8 if chart.main else 6, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    if chart.missing:
        axes.set_xlabel(chart.missing, size=8, color=GRAVE, parse_math=False)


def _draw_marks(axes: Axes, histories: list[History], axis: str) -> None:
    for history in histories:
        for kind in kinds(history):
            for mark in some(history.marked(kind)) if kind != "saved" else ():
                calm = kind == RESTARTED
                axes.axvline(
                    mark.axes[axis], color=CALM if calm else GRAVE, linewidth=0.9, alpha=0.7,
                    linestyle="--" if calm else "-", gid="mark",
                )  # fmt: skip


def axis_format(shown: Callable[[float], str]) -> FuncFormatter:
    """Return a formatter of an axis that shows its values as `shown` does."""

    def text(value: float, position: int) -> str:
        return shown(value)

    return FuncFormatter(text)


_SHOWN: dict[Unit, Any] = {
    "number": "{:.4g}".format,
    "amount": amount,
    "bytes": size,
    "share": "{:.0%}".format,
    "seconds": "{:.3g}".format,
    "tiny": "{:.1e}".format,
}
