"""What a run reports while it goes: events, and the numbers in them.

`train` and `benchmark` know no terminal. They hand events to one callback, `report`; the command
shows them, and metrics.jsonl keeps those that are numbers.
"""

import json
import os
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch

from pretrain_cli.files import write_whole


@dataclass(frozen=True)
class Notice:
    """Something a person should know: a choice made for them, a fallback, a skipped checkpoint."""

    text: str


@dataclass(frozen=True)
class Started:
    """The run as it was resolved, before its first step."""

    run: Path
    model: str
    parameters: int
    dataset: str
    device: str
    first_step: int
    steps: int
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. `loss` is the mean over all its tokens, on all ranks."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    """Seen so far, by all ranks: places in samples, of which packing leaves some empty."""
    tokens_per_second: float
    mfu: float | None
    """Model FLOPs by the exact mask, over the device's peak; None where no peak is known. With a
    document mask, which needs fewer, the mask is still counted as if a sample were one document."""
    data_wait: float
    """Seconds of the step spent waiting for its batch."""
    memory: int
    """Peak bytes so far: of the GPU, or of the process on a CPU."""
    seconds: float
    """Since the process began training."""
    sources: dict[str, int]
    """Tokens seen so far from each of several datasets, by name."""


@dataclass(frozen=True)
class Validation:
    """Of a validation split, every token once."""

    loss: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """The validation splits of all datasets together, every token once."""

    step: int
    loss: float
    bits_per_byte: float
    tokens: int
    sources: dict[str, Validation]
    """The same of each of several datasets, by name."""


@dataclass(frozen=True)
class Saved:
    step: int
    path: Path


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


Event = Notice | Started | StepMetrics | Evaluation | Saved | Sample | Finished
Report = Callable[[Event], None]

KINDS: dict[type, str] = {StepMetrics: "step", Evaluation: "evaluation"}


class MetricsFile:
    """metrics.jsonl: a line for each step reported and each evaluation."""

    def __init__(self, path: Path, *, upto: int) -> None:
        """Opens for appending; lines beyond step `upto` are of a future that was lost, and go."""
        self.path = path
        kept = [line for line in _rows(path) if json.loads(line)["step"] <= upto]
        rows = map(json.loads, kept)
        self.evaluated = {row["step"] for row in rows if row["kind"] == KINDS[Evaluation]}
        """Steps whose evaluation is in the file."""
        write_whole(path, "".join(kept))
        self.file: IO[str] = path.open("a")

    def write(self, event: StepMetrics | Evaluation) -> None:
        row: dict[str, Any] = {"kind": KINDS[type(event)], **asdict(event)}
        if not event.sources:
            del row["sources"]
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """Onto the disk, before a checkpoint that counts on it."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def _rows(path: Path) -> list[str]:
    """The whole lines of a metrics file; a kill can cut the last one short."""
    if not path.is_file():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU; resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Dense bfloat16 FLOP/s as the makers state them, by what the device calls itself.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def stated_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak in the table above; None for a device that is not in it, or another type."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((p for part, p in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)
