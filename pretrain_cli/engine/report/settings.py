"""The table of settings: in force, asked, and why they differ."""

from collections.abc import Iterable
from typing import Any

from pretrain_cli.engine.report.elements import tag, text, title
from pretrain_cli.engine.report.history import History


def settings(histories: list[History]) -> str:
    """Every setting in force, beside what was asked where that is something else."""
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
    """section.name → (in force, asked, why)."""
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
    """As YAML has it; a row of equal words counted."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(_runs(map(_value, value)))
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _runs(words: Iterable[str]) -> list[str]:
    """`a a a b` as `3 × a, b`."""
    groups: list[tuple[str, int]] = []
    for word in words:
        if groups and groups[-1][0] == word:
            groups[-1] = (word, groups[-1][1] + 1)
        else:
            groups.append((word, 1))
    return [word if count == 1 else f"{count} × {word}" for word, count in groups]
