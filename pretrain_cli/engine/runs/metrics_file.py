"""metrics.jsonl: a line per event, flushed to disk before a checkpoint, truncated on resume."""

import contextlib
import json
import math
import os
import resource
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, assert_never

import torch

from pretrain_cli.engine.runs import events
from pretrain_cli.engine.runs.events import KINDS, Evaluation, Event, Logged, Started, StepMetrics
from pretrain_cli.files import append_line, write_whole

OPTIONAL = ("memory_reserved", "z_loss", "balancing_loss", "expert_load", "expert_overload")
"""Fields that a line leaves out if they are None."""
PROC_STATUS = Path("/proc/self/status")


class MetricsFile:
    """Writes metrics.jsonl: a line per start, logged step, evaluation, save, skipped step and
    rollback.

    If the disk is full, lines stay in memory and are written before the next one.
    """

    def __init__(
        self, path: Path, notify: Callable[[str], None], *, upto: int, rollbacks: int = 0
    ) -> None:
        """Open for appending and drop lines after step `upto`: those steps will run again. Skipped
        steps that led to one of the `rollbacks` stay."""
        self.path, self.notify = path, notify
        rows = truncate_after(path, upto, rollbacks)
        self.evaluated = {row["step"] for row in rows if row["kind"] == KINDS[Evaluation]}
        """Steps whose evaluation is in the file."""
        steps = [row for row in rows if row["kind"] == KINDS[StepMetrics]]
        self.before = (steps[-1]["tokens"], steps[-1]["seconds"]) if steps else (0, 0.0)
        """Tokens and seconds of the run up to the last line."""
        self.file: IO[bytes] = path.open("ab", buffering=0)
        self.unwritten: deque[bytes] = deque()
        self.lock = threading.Lock()
        """A save brings the file onto the disk from a thread of its own."""

    def take(self, event: Event) -> None:
        """Write the event's line, if it has one."""
        match event:
            case Started():
                if event.step < event.steps:  # a process with no step to take leaves no trace
                    self.write(event)
            case StepMetrics() | Evaluation() | events.Skipped() | events.RolledBack():
                self.write(event)
            case events.Saved() | events.Unsaved():
                self.write(event)
            case events.Notice() | events.Profiled() | events.Sample() | events.Finished():
                pass
            case _:
                assert_never(event)

    def write(self, event: Started | Logged) -> None:
        row: dict[str, Any] = {"kind": KINDS[type(event)], **_in_json(asdict(event))}
        if not row.get("sources", True):
            del row["sources"]
        for name in OPTIONAL:
            if row.get(name, 0) is None:
                del row[name]
        first = not self.unwritten
        self.unwritten.append((json.dumps(row, default=str) + "\n").encode())
        try:
            self._write_out()
        except OSError as error:
            if first:
                self.notify(f"{self.path}: {error.strerror}; its lines wait in memory")

    def _write_out(self) -> None:
        with self.lock:
            while self.unwritten:
                append_line(self.file, self.unwritten[0])
                self.unwritten.popleft()

    def flush(self) -> None:
        """Do nothing: `sync` flushes, in the thread that writes the checkpoint."""

    def sync(self) -> None:
        """Flush to disk, before a checkpoint that counts on these lines. Raises OSError."""
        self._write_out()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        try:
            self._write_out()
        except OSError as error:
            lines = len(self.unwritten)
            self.notify(f"{self.path}: {error.strerror}; its last lines, {lines} of them, are lost")
        self.file.close()


def truncate_after(path: Path, step: int, rollbacks: int = 0) -> list[dict[str, Any]]:
    """Cut a file of JSON lines after this step and return the remaining rows. Lines that count
    rollbacks are ordered by these first. The last line may be incomplete after a kill; it is
    dropped."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    rows = [json.loads(line) for line in lines]
    kept = [i for i, row in enumerate(rows) if _order(row, rollbacks) <= (rollbacks, step)]
    write_whole(path, "".join(lines[i] for i in kept))
    return [rows[i] for i in kept]


def _order(row: dict[str, Any], rollbacks: int) -> tuple[int, int]:
    return row.get("rollbacks", rollbacks), row["step"]


def _in_json(value: Any) -> Any:
    """Replace numbers that JSON lacks (NaN, infinities) by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _in_json(part) for key, part in value.items()}
    return [_in_json(part) for part in value] if isinstance(value, list | tuple) else value


def peak_memory(device: torch.device) -> int:
    """Return peak bytes: allocated on a GPU; resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if PROC_STATUS.is_file():  # preferred: getrusage's peak includes that of the parent process
        for line in PROC_STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_reserved_memory(device: torch.device) -> int | None:
    """Return the peak bytes that torch holds on a GPU, allocated or not; None on other devices."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Restart peak counting. On systems that cannot, the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif PROC_STATUS.is_file():
        with contextlib.suppress(OSError):
            PROC_STATUS.with_name("clear_refs").write_text("5")
