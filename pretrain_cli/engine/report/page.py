"""One self-contained HTML file: it opens offline, years from now, from an e-mail.

Numbers are in a JSON block, text is escaped, and a Content-Security-Policy allows only the script
that comes with the page. Content of samples and names is always shown as text.
"""

import base64
import hashlib
import json
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import numpy as np

from pretrain_cli import __version__
from pretrain_cli.engine.report import tables
from pretrain_cli.engine.report.charts import build_charts
from pretrain_cli.engine.report.history import AXES, RESTARTED, Curves, Floats, History, some, thin
from pretrain_cli.engine.report.tables import COLORS, settings, text


def render(histories: list[History]) -> str:
    """Return the page's HTML."""
    style = _part("vendor/uPlot.min.css") + _part("page.css")
    licence = f"/* uPlot:\n{_part('vendor/uPlot.LICENSE.txt')}*/\n"
    script = licence + _part("vendor/uPlot.iife.min.js") + _part("page.js")
    names = ", ".join(history.name for history in histories)
    fields = {
        "title": text(names),
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "style": style,
        "script": script,
        "data": _embedded(page_data(histories)),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "summary": tables.summary(histories),
        "events": tables.events(histories),
        "samples": tables.samples(histories),
        "settings": settings(histories),
        "several": "several" if len(histories) > 1 else "one",
    }
    pieces = _part("page.html").split("%%")  # alternates text and field names
    pieces[1::2] = [fields[name] for name in pieces[1::2]]
    return "".join(pieces)


def page_data(histories: list[History]) -> dict[str, Any]:
    """Return the data that the page's script draws, with all digits of the files' numbers."""
    return {
        "runs": [
            {
                "name": history.name,
                "color": number % COLORS,
                "steps": _curves(history.steps),
                "evaluations": _curves(history.evaluations),
                "marks": _marks(history),
            }
            for number, history in enumerate(histories)
        ],
        "charts": [
            {
                "title": chart.title,
                "unit": chart.unit,
                "about": chart.about,
                "missing": chart.missing,
                "main": chart.main,
                "curves": [vars(curve) for curve in chart.curves],
            }
            for chart in build_charts(histories)
        ],
    }


def _curves(curves: Curves) -> dict[str, Any]:
    thinned = thin(curves)
    return {
        "rows": len(curves),
        "rowsTogether": thinned.rows_together,
        "axes": _lists(thinned.curves.axes),
        "values": _lists(thinned.curves.values),
        "low": _lists(thinned.low),
        "high": _lists(thinned.high),
    }


def _lists(columns: dict[str, Floats]) -> dict[str, list[float | None]]:
    return {name: [_number(value) for value in column] for name, column in columns.items()}


def _number(value: float) -> float | None:
    """Replace NaN, which JSON lacks, by None, and drop the `.0` of whole numbers."""
    value = float(value)
    if not np.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _marks(history: History) -> list[dict[str, Any]]:
    return [
        {
            "kind": tables.words(kind),
            "shown": kind != "saved",
            "grave": kind not in ("saved", RESTARTED),
            "text": tables.details(mark),
            **{axis: _number(mark.axes[axis]) for axis in AXES},
        }
        for kind in tables.kinds(history)
        for mark in some(history.marked(kind))
    ]


def _embedded(value: Any) -> str:
    """Return JSON that can neither close the element that contains it nor open another."""
    written = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        written = written.replace(sign, f"\\u{ord(sign):04x}")
    return written


def _part(name: str) -> str:
    return files("pretrain_cli.engine.report").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """Return the hash of an element's content, as a Content-Security-Policy names it."""
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
