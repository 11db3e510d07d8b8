"""Fixtures of the command tests: `refused` checks an error and that no file changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Map every file below, hidden ones too, to (size, mtime); list folders but data/ and runs/."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        stat = path.stat()
        if path.is_file():
            found[name] = (stat.st_size, stat.st_mtime_ns)
        elif name not in ("data", "runs"):
            found[name] = (0, 0)
    return found


@pytest.fixture
def refused(pretrain: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Run a command line that must be refused, and return its error message. Checks for exit code
    2, one `error:` line, and no file created, changed or removed in the current folder."""

    def check(line: str, stdin: str = "") -> str:
        before = tree(tmp_path)
        outcome = pretrain(line, stdin)
        assert outcome.code == 2, (outcome.code, outcome.out, outcome.err)
        errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert outcome.err.splitlines()[-1] == errors[0]  # the last line of the output
        assert "error:" not in outcome.out
        after = tree(tmp_path)
        names = before.keys() | after.keys()
        assert not {name for name in names if before.get(name) != after.get(name)}
        return errors[0].removeprefix("error: ")

    return check
