"""Check that resuming is exact, with this machine, model and settings.

    a process:  N steps                              ─┐
    a process:  N/2 steps, saved                      ├─ every loss, weight and optimizer tensor
    a process:  resumed, from N/2 to N                ─┘ of the two runs compared, bit for bit

The steps are the first ones of the run that the settings describe, with its schedule. The run
folders lie beside the place of that run and are removed afterwards.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.engine.runs.events import Emit, Notice, ignore
from pretrain_cli.engine.runs.retention import checkpoints
from pretrain_cli.engine.runs.run_yaml import read_record
from pretrain_cli.engine.runtime.fresh_process import in_a_fresh_process
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.engine.training.run_start import RUNS
from pretrain_cli.engine.training.train import train
from pretrain_cli.errors import ConfigError

NUMBERS = ("loss", "gradient_norm", "learning_rate", "tokens")


@dataclass(frozen=True)
class Comparison:
    """Result of comparing an uninterrupted run with a resumed one."""

    numbers: int
    tensors: int
    difference: str
    """First difference, in words; empty if all numbers and tensors are equal."""


def check_resume(settings: RunConfig, steps: int, emit: Emit, stop: StopRequest) -> Comparison:
    """Train both runs and compare them. Raises Stopped if `stop` requests it."""
    if steps < 2:
        raise ConfigError(f"--check-resume: {steps} is not at least 2 steps, one before a save")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--check-resume: trains in processes of its own; start it without ranks")
    home = settings.train.out.parent if settings.train.out else RUNS
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".check-resume-", dir=home) as folder:
        straight, halves = Path(folder, "straight"), Path(folder, "halves")
        for said, run, upto in (
            (f"{steps} steps straight", straight, steps),
            (f"{steps // 2} steps, saved", halves, steps // 2),
            (f"Resumed to step {steps}", halves, steps),
        ):
            emit(Notice(said))
            checked = _of_the_check(settings, run)
            reached = in_a_fresh_process(_train, checked, run, upto, stop=lambda: stop.asked)
            if reached != upto:
                raise ConfigError(
                    f"--check-resume: the run has {reached:,} steps in all; check at most so many"
                )
        return compare(straight, halves)


def _of_the_check(settings: RunConfig, run: Path) -> RunConfig:
    changes = {"out": run, "log_every": 1, "max_time": None, "sample_tokens": 0, "log": ()}
    return settings.model_copy(update={"train": settings.train.model_copy(update=changes)})


def _train(settings: RunConfig, run: Path, upto: int) -> int:
    """Start the run, or resume it if its folder exists. Return the step it reached."""
    resume = (run, read_record(run)) if run.exists() else None
    # Silent: the three processes would show the same notices three times.
    return train(settings, ignore, resume=resume, stop=StopRequest(after_step=upto)).step


def compare(straight: Path, resumed: Path) -> Comparison:
    """Compare the logged numbers of two runs and all tensors of their newest checkpoints."""
    ours, theirs = list(_numbers(straight)), list(_numbers(resumed))
    pairs = itertools.zip_longest(ours, theirs)
    differences = (f"{a} straight, {b} resumed" for a, b in pairs if a != b)
    first = next(differences, "")
    one, other = (_tensors(checkpoints(run)[0]) for run in (straight, resumed))
    for name in sorted(one.keys() | other.keys()):
        if first:
            break
        if name not in one or name not in other:
            first = f"{name}: only in the run {'straight' if name in one else 'resumed'}"
        else:
            first = _first_difference(name, _read(one[name], name), _read(other[name], name))
    return Comparison(len(ours), len(one), first)


def _numbers(run: Path) -> Iterator[str]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in NUMBERS:
            if row["kind"] in ("step", "evaluation") and name in row:
                yield f"{row['kind']} {row['step']}, {name}: {row[name]!r}"


def _tensors(checkpoint: Path) -> dict[str, Path]:
    """Map each tensor's key (folder of its file, name) to its file."""
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        part = "optimizer" if path.parent != checkpoint else "weights"
        with safe_open(path, framework="pt") as file:
            found |= {f"{part} {name}": path for name in file.keys()}  # noqa: SIM118
    return found


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name.partition(" ")[2])


def _first_difference(name: str, one: Tensor, other: Tensor) -> str:
    """Describe where two tensors first differ in their bits; empty if they are equal."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        shapes = f"{tuple(one.shape)} straight, {tuple(other.shape)} resumed"
        return f"{name}: {one.dtype} {shapes}, {other.dtype}"
    bits = [each.contiguous().view(-1).view(torch.uint8) for each in (one, other)]
    differ = (bits[0] != bits[1]).nonzero()
    if not len(differ):
        return ""
    flat = torch.tensor(int(differ[0]) // one.element_size())
    index = [int(i) for i in torch.unravel_index(flat, one.shape)]
    values = [each.view(-1)[flat].item() for each in (one, other)]
    return f"{name}{index}: {values[0]!r} straight, {values[1]!r} resumed"
