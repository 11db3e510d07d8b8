"""What a run reports while it goes: events, and the numbers in them.

`train` and `benchmark` know no terminal. They hand events to one callback, `emit`; the command
shows them, and metrics.jsonl keeps those that are numbers.
"""

import contextlib
import json
import math
import os
import resource
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch

from pretrain_cli.engine.runtime.profiler import Profile
from pretrain_cli.files import append_line, write_whole

PROC_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Notice:
    """Something a person should know: a choice made for them, a fallback, a skipped checkpoint."""

    text: str


@dataclass(frozen=True)
class Started:
    """The run as it was resolved, before this process's first step."""

    step: int
    """Those done before."""
    time: float
    run: Path
    model: str
    parameters: int
    dataset: str
    device: str
    ranks: int
    steps: int
    tokens_per_step: int
    flops_per_token: float
    """By the exact mask, a sample taken as one document."""
    flops_per_token_conventional: float
    peak_flops: float
    """Of one device: what MFU is a share of."""
    peak_source: str
    peak_measured: float


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, and the time since the line before. Lines leave evaluating, sampling and
    saving out of `tokens_per_second` and MFU; those of the run count all of its time."""

    step: int
    time: float
    """Seconds since 1970."""
    seconds: float
    """The run has taken so far, all in all; what was done again after a kill counts once."""
    loss: float
    """The mean over all tokens of the step, on all ranks."""
    learning_rate: float
    gradient_norm: float
    tokens: int
    """Seen so far, by all ranks: places in samples, of which packing leaves some empty."""
    tokens_per_second: float
    run_tokens_per_second: float
    mfu: float
    """Model FLOPs by the exact mask, over the devices' peak. With a document mask, which needs
    fewer, the mask is still counted as if a sample were one document."""
    mfu_conventional: float
    """The same with every token taken to see the whole sample."""
    data_wait: float
    """Seconds a step spent waiting for its batch, on average."""
    save_stall: float
    """Seconds that saving kept training waiting since the last line."""
    evaluation_time: float
    """Seconds spent evaluating and sampling since the last line."""
    memory: int
    """Peak bytes so far: of the GPU, or of the process on a CPU."""
    sources: dict[str, int]
    """Tokens seen so far from each of several datasets, by name."""
    z_loss: float | None = None
    """What is minimized is the sum: loss + z_loss + balancing_loss. None where there is none."""
    balancing_loss: float | None = None
    expert_load: list[float] | None = None
    """The share of the step's choices that fell on each expert, in all layers."""
    expert_overload: float | None = None
    """The choices of the busiest expert over the mean, in the layer where that is highest."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Of a validation split, every token once; or of its first ones, with train.eval_tokens."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    split_tokens: int
    """Of the whole split."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Validation):
    """The validation splits of all datasets together."""

    step: int
    time: float
    """Seconds since 1970, when it was done."""
    evaluation_time: float
    """Seconds that it took."""
    sources: dict[str, Validation]
    """The same of each of several datasets, by name."""


@dataclass(frozen=True)
class Skipped:
    """A step that changed nothing, and what its batch does to the weights as they are now."""

    step: int
    reason: str
    loss: float
    gradient_norm: float
    samples: tuple[int, int]
    """The first, and the one behind the last."""
    worst_samples: list[dict[str, Any]]
    """Those of the highest loss: number, source, loss, head of the text."""
    worst_gradients: dict[str, float]
    """The largest norms of gradients, by the tensors' published names."""
    same_weights: bool
    """Whether no step was taken between this one and the look into it."""
    rollbacks: int
    """How often the run had gone back by then."""


@dataclass(frozen=True)
class RolledBack:
    """The run goes on from a checkpoint, with the samples behind those that led astray."""

    step: int
    """Of the checkpoint."""
    from_step: int
    reason: str
    samples: tuple[int, int]
    """Passed over: the first, and the one that the run goes on with."""
    rollbacks: int
    """How often the run has gone back, with this time."""


@dataclass(frozen=True)
class Profiled:
    """A few steps looked into, up to this one."""

    step: int
    profile: Profile


@dataclass(frozen=True)
class Saved:
    """A checkpoint is there."""

    step: int
    path: Path
    time: float
    """Seconds since 1970, when it was."""
    stall: float
    """Seconds that training waited for it."""
    seconds: float
    """Seconds that writing it took, behind training."""
    bytes: int


@dataclass(frozen=True)
class Unsaved:
    """A save failed. Training goes on, and the next one tries again."""

    step: int
    time: float
    reason: str


@dataclass(frozen=True)
class Sample:
    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Finished:
    run: Path
    step: int
    steps: int
    reason: Literal["done", "stopped"]


Logged = StepMetrics | Evaluation | Skipped | RolledBack | Saved | Unsaved
Event = Notice | Started | Logged | Profiled | Sample | Finished
Emit = Callable[[Event], None]

KINDS: dict[type, str] = {
    Started: "start",
    StepMetrics: "step",
    Evaluation: "evaluation",
    Skipped: "skipped",
    RolledBack: "rollback",
    Saved: "saved",
    Unsaved: "not_saved",
}


class MetricsFile:
    """metrics.jsonl: a line for each start, each step reported, each evaluation, each save, each
    step skipped and each way back.

    While the disk takes no line they are kept here, and written before the next one."""

    def __init__(
        self, path: Path, notify: Callable[[str], None], *, upto: int, rollbacks: int = 0
    ) -> None:
        """Opens for appending; lines beyond step `upto` are of a future that was lost, and go. What
        was skipped on the way to one of the `rollbacks` stays."""
        self.path, self.say = path, notify
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

    def write(self, event: Started | Logged) -> None:
        row: dict[str, Any] = {"kind": KINDS[type(event)], **_in_json(asdict(event))}
        if not row.get("sources", True):
            del row["sources"]
        for name in ("z_loss", "balancing_loss", "expert_load", "expert_overload"):
            if row.get(name, 0) is None:
                del row[name]
        first = not self.unwritten
        self.unwritten.append((json.dumps(row, default=str) + "\n").encode())
        try:
            self._write_out()
        except OSError as error:
            if first:
                self.say(f"{self.path}: {error.strerror}; its lines wait in memory")

    def _write_out(self) -> None:
        with self.lock:
            while self.unwritten:
                append_line(self.file, self.unwritten[0])
                self.unwritten.popleft()

    def sync(self) -> None:
        """Onto the disk, before a checkpoint that counts on it. Raises OSError."""
        self._write_out()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        try:
            self._write_out()
        except OSError as error:
            lines = len(self.unwritten)
            self.say(f"{self.path}: {error.strerror}; its last lines, {lines} of them, are lost")
        self.file.close()


def truncate_after(path: Path, step: int, rollbacks: int = 0) -> list[dict[str, Any]]:
    """Cut a file of JSON lines to those up to this step, and give them. Those that count the
    rollbacks before them order by these first. A kill can have cut the last line short."""
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
    """With null for the numbers that JSON doesn't have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _in_json(part) for key, part in value.items()}
    return [_in_json(part) for part in value] if isinstance(value, list | tuple) else value


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU; resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if PROC_STATUS.is_file():  # getrusage's peak begins with that of the process that began this
        for line in PROC_STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak anew from here; where the system can't, it stays that of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif PROC_STATUS.is_file():
        with contextlib.suppress(OSError):
            PROC_STATUS.with_name("clear_refs").write_text("5")
