"""A slot's view of the check: its device, its time, and the file that its results go to.

A result is one JSON line of `results.jsonl`, written and flushed at once:

    {"slot", "arm", "ok": true | false | null, "error", ...figures, each with its unit in its name}

`ok` is null where there is a figure and nothing to hold it to. An arm that fails writes its error,
and the next one starts. An arm that would not fit in the slot's time is written as dropped.
"""

import contextlib
import gc
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line and flush it to disk. Several processes may append to one file."""
    line = json.dumps(_in_json(row)).encode() + b"\n"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, without a last one that was cut."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the last row of each arm, where its first one was."""
    kept = {(row["slot"], row["arm"], "state" in row): row for row in rows}
    return list(kept.values())


def _in_json(value: Any) -> Any:
    """Write NaN and infinities, which JSON lacks, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _in_json(part) for key, part in value.items()}
    return [_in_json(part) for part in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a slot is given. Times are those of `time.monotonic`, the same in every process."""

    slot: str
    out: Path
    """Folder of the results."""
    scratch: Path
    """Folder for everything else; removed at the end."""
    device: str
    rehearse: bool
    """True for tiny shapes: everything runs, and no figure means anything."""
    until: float
    """Moment at which the slot is killed."""
    compile_only: bool = False
    """True in the background, before the timing slots: fill the cache of compiled kernels."""

    @property
    def has_values(self) -> bool:
        """False on the GPU of tests/null_gpu, whose kernels compute nothing. It has no profiler of
        kernels either."""
        return "NULL_GPU" not in os.environ

    def left_s(self) -> float:
        return self.until - time.monotonic()

    def share(self, part: float) -> "Check":
        """Return a check with this part of the time that is left."""
        return replace(self, until=time.monotonic() + part * self.left_s())

    def write(self, arm: str, **figures: Any) -> None:
        """Write a result."""
        append(self.out / RESULTS, {"slot": self.slot, "arm": arm, **figures})

    def fits(self, arm: str, seconds: float) -> bool:
        """Return whether about this many seconds are left; if not, write that the arm is
        dropped."""
        if self.left_s() > seconds:
            return True
        self.write(arm, ok=None, dropped=f"{max(0.0, self.left_s()):.0f} s left of {seconds:.0f}")
        return False

    @contextlib.contextmanager
    def arm(self, name: str) -> Generator[dict[str, Any]]:
        """Yield a dict of figures and write it as this arm's result, with its error if it raises.
        Writes nothing if there is neither.

        Frees the memory of a failed arm, so that the next one has it.
        """
        figures: dict[str, Any] = {}
        began = time.monotonic()
        try:
            yield figures
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
            self.write(name, **{**figures, "ok": False, "error": said})
            error.__traceback__ = None
            free_memory()
        else:
            if figures:
                took = time.monotonic() - began
                self.write(name, **{"ok": None, **figures, "took_s": round(took, 2)})


def free_memory() -> None:
    """Return freed GPU memory to the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
