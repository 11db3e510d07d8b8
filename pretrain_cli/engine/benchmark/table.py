"""A record as rows of text, for the terminal and for Markdown."""

from dataclasses import dataclass
from typing import Any

from pretrain_cli.units import duration, size

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
class Row:
    group: str
    cells: tuple[str, ...]
    is_run: bool
    differs: bool


def rows(results: list[dict[str, Any]]) -> list[Row]:
    """A row an arm."""
    return [_row(result) for result in results]


def remarks(results: list[dict[str, Any]]) -> list[str]:
    """What is to be said of single arms: differences first."""
    said = [f"{r['arm']} {r['differs']}" for r in results if r["differs"]]
    for result in results:
        if result["kind"] == "forward only":
            said.append(f"{result['arm']}: {result['reason']}; its forward pass alone was timed")
    # what is the same of many arms is said once
    notes = dict[str, list[str]]()
    for result in results:
        left_out = [f"not run: {result['reason']}"] if result["kind"] == "not run" else []
        for note in left_out + result["notes"]:
            notes.setdefault(note, []).append(result["arm"])
    return said + [f"{', '.join(arms)}: {note}" for note, arms in notes.items()]


def _row(result: dict[str, Any]) -> Row:
    figures, name, group = result["figures"], result["arm"], result["group"]
    if figures is None:
        shown = "not run" if result["kind"] == "not run" else "…"
        return Row(group, (name, shown, *[""] * (len(COLUMNS) - 2)), False, False)
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
    return Row(group, cells, True, bool(result["differs"]))
