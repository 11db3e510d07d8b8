"""Text parts of the page: a summary of each run, its events and its samples."""

from collections.abc import Callable, Iterable
from html import escape
from typing import Any

import numpy as np

from pretrain_cli.engine.report.history import RESTARTED, START, History, Mark, Sample
from pretrain_cli.units import amount, duration, size

EVENTS_SHOWN, SAMPLES_SHOWN = 200, 30
"""Maximum events and samples shown for a run; the page counts the rest."""


# --- summary -------------------------------------------------------------------------------------


def summary(histories: list[History]) -> str:
    """Return a card for each run: its progress and main numbers."""
    cards = []
    for number, history in enumerate(histories):
        facts = "".join(
            tag("div", tag("dt", text(name)) + tag("dd", text(value) + tag("small", text(more))))
            for name, value, more in _facts(history)
        )
        head = tag("h2", title(histories, number)) + tag("p", text(_what(history)), class_="what")
        cards.append(tag("article", head + tag("dl", facts) + _notes(history), class_="card"))
    return "".join(cards)


def _what(history: History) -> str:
    model, data = history.section("model").get("name"), history.section("dataset").get("path")
    device = history.section("machine").get("device")
    named = [f"{model or 'unknown model'} on {data or 'an unknown dataset'}", device]
    return ", ".join(str(part) for part in named if part)


def _facts(history: History) -> list[tuple[str, str, str]]:
    """Return (name, value, detail) for each fact that the run has."""
    steps, evaluations = history.steps, history.evaluations
    facts = []
    if len(steps):
        asked = history.section("settings", "train").get("steps")
        of = f" of {asked:,}" if isinstance(asked, int) else ""
        facts.append(("steps", f"{steps.axes['step'][-1]:,.0f}", of))
        facts += _last("tokens", steps.axes["tokens"], amount)
        facts += _last("time", steps.axes["time"], duration)
    else:
        facts.append(("steps", "none", " in metrics.jsonl"))
    if steps.has("loss"):
        facts += _last("training loss", steps.values["loss"], "{:.4f}".format)
    if evaluations.has("loss"):
        facts += _last("validation loss", evaluations.values["loss"], "{:.4f}".format)
        best = int(np.nanargmin(evaluations.values["loss"]))
        at = f" at step {evaluations.axes['step'][best]:,.0f}"
        facts.append(("lowest validation", f"{evaluations.values['loss'][best]:.4f}", at))
    else:
        facts.append(("validation loss", "none", " in metrics.jsonl"))
    if evaluations.has("bits_per_byte"):
        facts += _last("bits per byte", evaluations.values["bits_per_byte"], "{:.4f}".format)
    if steps.has("tokens_per_second"):
        middle = float(np.nanmedian(steps.values["tokens_per_second"]))
        facts.append(("tokens/s", amount(middle), " median"))
    if steps.has("run_tokens_per_second"):
        facts += _last("tokens/s of the run", steps.values["run_tokens_per_second"], amount)
    if steps.has("mfu"):
        facts.append(("MFU", f"{np.nanmedian(steps.values['mfu']):.1%}", " median"))
    if steps.has("memory"):
        facts.append(("peak memory", size(float(np.nanmax(steps.values["memory"]))), ""))
    if steps.has("memory_reserved"):
        most = float(np.nanmax(steps.values["memory_reserved"]))
        facts.append(("peak reserved memory", size(most), ""))
    facts += [
        (words(kind), f"{len(history.marked(kind)):,}", "")
        for kind in kinds(history)
        if kind != "saved"
    ]
    total = sum(history.source_tokens.values())
    for name, tokens in history.source_tokens.items():
        share = f" · {tokens / total:.1%}" if total else ""
        facts.append((f"tokens of {name}", amount(tokens), share))
    return facts


def kinds(history: History) -> list[str]:
    """Return the kinds of a run's events, restarts first, without its start."""
    found = dict.fromkeys(mark.kind for mark in history.marks if mark.kind != START)
    return sorted(found, key=lambda kind: kind != RESTARTED)


def _last(name: str, column: Any, shown: Callable[[float], str]) -> list[tuple[str, str, str]]:
    known = column[np.isfinite(column)]
    return [(name, shown(float(known[-1])), "")] if len(known) else []


def _notes(history: History) -> str:
    return "".join(tag("p", text(note), class_="note") for note in history.notes)


# --- events and samples --------------------------------------------------------------------------


def events(histories: list[History]) -> str:
    """Return the table of events, in the order of the file."""
    parts = []
    for number, history in enumerate(histories):
        marks = [mark for mark in history.marks if mark.kind not in (START, "saved")]
        if not marks:
            continue
        rows = "".join(
            tag(
                "tr",
                tag("td", f"{mark.axes['step']:,.0f}", class_="number")
                + tag("td", text(words(mark.kind)), class_="what")
                + tag("td", text(details(mark))),
            )
            for mark in marks[:EVENTS_SHOWN]
        )
        head = "".join(tag("th", name, scope="col") for name in ("step", "what", "details"))
        table = tag("table", tag("thead", tag("tr", head)) + tag("tbody", rows))
        parts.append(_heading(histories, number) + tag("div", table, class_="wide"))
        parts.append(_left_out(len(marks) - EVENTS_SHOWN, "more; metrics.jsonl has them all"))
    return "".join(parts) or tag("p", "No restarts, no skipped steps.", class_="about")


def words(kind: str) -> str:
    return kind.replace("_", " ")


def details(mark: Mark) -> str:
    """Return a row's fields besides its kind and step."""
    return ", ".join(
        f"{words(str(name))} {_plain(value)}"
        for name, value in mark.details.items()
        if value not in (None, "", [], {}) and name not in ("seconds", "time")
    )


def _plain(value: Any) -> str:
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    return shown if len(shown) <= 300 else shown[:300] + " …"


def samples(histories: list[History]) -> str:
    """Return the texts sampled from the models, newest first, with the newest expanded."""
    parts = []
    for number, history in enumerate(histories):
        if not history.samples:
            continue
        parts.append(_heading(histories, number))
        newest = history.samples[::-1]
        for rank, sample in enumerate(newest[:SAMPLES_SHOWN]):
            parts.append(_sample(sample, is_open=rank < 3))
        parts.append(_left_out(len(newest) - SAMPLES_SHOWN, "earlier ones; samples.jsonl has them"))
    return "".join(parts) or tag("p", "samples.jsonl has none.", class_="about")


def _sample(sample: Sample, *, is_open: bool) -> str:
    prompt = tag("span", text(sample.prompt), class_="prompt") if sample.prompt else ""
    body = tag("summary", f"step {sample.step:,}") + tag("pre", prompt + text(sample.text))
    return f"<details{' open' if is_open else ''}>{body}</details>"


def _heading(histories: list[History], number: int) -> str:
    return tag("h3", title(histories, number)) if len(histories) > 1 else ""


def _left_out(count: int, what: str) -> str:
    return tag("p", f"{count:,} {what}.", class_="note") if count > 0 else ""


def settings(histories: list[History]) -> str:
    """Return the table of settings in force, with the requested value if it differs."""
    tables = [_settings_of(history) for history in histories]
    names = dict.fromkeys(name for table in tables for name in table)
    sections: dict[str, list[str]] = {}
    for name in names:
        cells = [table.get(name) for table in tables]
        differs = len({cell[0] if cell else None for cell in cells}) > 1
        row = tag("th", text(name.partition(".")[2]), scope="row")
        row += "".join(_setting(cell) for cell in cells)
        row = tag("tr", row, **({"class_": "differs"} if differs else {}))
        sections.setdefault(name.partition(".")[0], []).append(row)
    titles = [title(histories, number) for number in range(len(histories))]
    heads = [tag("th", name, scope="col") for name in ["setting", *titles]]
    head = tag("thead", tag("tr", "".join(heads)))
    span = str(len(histories) + 1)
    bodies = "".join(
        tag("tbody", tag("tr", tag("th", text(section), colspan=span, scope="rowgroup"),
                         class_="section") + "".join(rows))
        for section, rows in sections.items()
    )  # fmt: skip
    return tag("div", tag("table", head + bodies, id="settings-table"), class_="wide")


def _setting(cell: tuple[str, str, str] | None) -> str:
    if cell is None:
        return tag("td", "")
    in_force, asked, why = cell
    more = [f"asked: {asked}"] if asked != in_force else []
    more += [why] if why else []
    return tag("td", text(in_force) + (tag("small", text(" · ".join(more))) if more else ""))


def _settings_of(history: History) -> dict[str, tuple[str, str, str]]:
    """Return section.name → (in force, requested, reason)."""
    found: dict[str, tuple[str, str, str]] = {}
    decisions = history.section("speed")
    for section, values in history.section("settings").items():
        asked = history.section("asked", section)
        for name, value in values.items() if isinstance(values, dict) else ():
            wanted, in_force, why = asked.get(name, value), value, ""
            if section == "speed" and isinstance(decision := decisions.get(name), dict):
                in_force, why = decision.get("in_force", value), decision.get("reason", "")
            found[f"{section}.{name}"] = (_value(in_force), _value(wanted), str(why))
    for section in ("model", "dataset", "software", "machine"):
        group = "architecture" if section == "model" else section
        for name, value in history.section(section).items():
            found[f"{group}.{name}"] = (_value(value), _value(value), "")
    return found


def _value(value: Any) -> str:
    """Format a value as YAML; repeated words in a row are counted."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(_runs(map(_value, value)))
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _runs(words: Iterable[str]) -> list[str]:
    """Shorten `a a a b` to `3 × a, b`."""
    groups: list[tuple[str, int]] = []
    for word in words:
        if groups and groups[-1][0] == word:
            groups[-1] = (word, groups[-1][1] + 1)
        else:
            groups.append((word, 1))
    return [word if count == 1 else f"{count} × {word}" for word, count in groups]


COLORS = 8


def text(value: Any) -> str:
    """Escape text from a file for the page."""
    return escape(str(value))


def tag(name: str, content: str, **attributes: str) -> str:
    """Return an element. `content` is HTML; attributes are escaped."""
    given = "".join(f' {key.rstrip("_")}="{text(value)}"' for key, value in attributes.items())
    return f"<{name}{given}>{content}</{name}>"


def title(histories: list[History], number: int) -> str:
    """Return a run's name, with its color if there are several runs."""
    name = text(histories[number].name)
    if len(histories) == 1:
        return name
    return tag("span", "", class_=f"swatch c{number % COLORS}") + name
