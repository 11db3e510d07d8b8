"""Lines of JSON, of which a kill can cut the last one short and a disk can damage any."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

Row = dict[str, Any]


class Rows:
    """The rows of a .jsonl file that are whole and have a step; the others are counted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0

    def __iter__(self) -> Iterator[Row]:
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
        """What a person should know of the lines left out."""
        if not self.damaged:
            return None
        lines = "1 line is" if self.damaged == 1 else f"{self.damaged:,} lines are"
        return f"{self.path.name}: {lines} damaged and left out"


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether JSON's value is a number that a float holds; NaN and Infinity are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**1000
