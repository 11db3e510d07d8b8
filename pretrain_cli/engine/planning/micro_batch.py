"""Choose the micro-batch: the number of sequences that a rank computes at once.

It affects time and memory. It changes results by rounding only, because a step's loss is the mean
over its tokens. The first rule that applies decides:

    1. the size that the settings give
    2. the run's earlier size, if it resumes on the same machine: results repeat bit for bit
    3. the fastest size measured here for this model, length and settings
    4. the largest size

Rules 2 to 4 take a divisor of the rank's share of the step; rules 3 and 4 also need its estimated
memory to fit. `pretrain benchmark --find-micro-batch` saves its measurements in
runs/micro-batches.json.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.planning.memory_estimate import USABLE_FRACTION
from pretrain_cli.engine.runtime.host_memory import available_memory
from pretrain_cli.errors import ConfigError
from pretrain_cli.files import write_whole
from pretrain_cli.model.config import ModelConfig

MEASURED = Path("runs/micro-batches.json")
MICRO_BATCH_KEYS = SpeedConfig.names("decides_micro_batch")
TIE_TOLERANCE = 0.02
"""Relative difference below which two rates count as equal; the smaller micro-batch then wins."""
ASSUMED_FREE_BYTES = 8 * 10**9
"""Bytes assumed to be free if the system doesn't report its free memory."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch size, in sequences, and the reason for it."""

    size: int
    reason: str
    """Reason for the choice; empty if the settings give the size."""


def choose_micro_batch(
    share: int,
    bytes_of: Callable[[int], int],
    room: float,
    *,
    had: int | None = None,
    rates: dict[int, float] | None = None,
) -> MicroBatch:
    """Choose among the divisors of `share`, a rank's sequences in a step; 1 if none fits.

    `bytes_of` gives the estimated memory of a size, `room` the available bytes, `rates` measured
    tokens/s by size, and `had` the run's earlier size on this machine.
    """
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    if had in sizes:
        return MicroBatch(had, "as before")
    fitting = [size for size in sizes if bytes_of(size) <= room] or [1]
    measured = {size: (rates or {})[size] for size in fitting if size in (rates or {})}
    if measured:
        return MicroBatch(fastest(measured), "the fastest measured here")
    return MicroBatch(max(fitting), "by the estimate of memory")


def fastest(rates: dict[int, float]) -> int:
    """Return the smallest micro-batch whose rate is within TIE_TOLERANCE of the best."""
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= (1 - TIE_TOLERANCE) * best)


def memory_here(device: torch.device) -> float:
    """Return the bytes that a run may use on this device: its free memory minus a margin."""
    if device.type == "cuda":
        return USABLE_FRACTION * torch.cuda.mem_get_info(device)[0]
    return USABLE_FRACTION * (available_memory() or ASSUMED_FREE_BYTES)


# --- saved measurements --------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Measured tokens/s by micro-batch, with the machine and workload that they belong to."""

    machine: str
    torch: str
    model: dict[str, Any]
    seq_len: int
    speed: dict[str, Any]
    tokens_per_second: dict[int, float]

    def is_of_the_same(self, other: "Measured") -> bool:
        return dataclasses.replace(self, tokens_per_second={}) == dataclasses.replace(
            other, tokens_per_second={}
        )


def measured(
    machine: str,
    model: ModelConfig,
    seq_len: int,
    speed: dict[str, Any],
    rates: dict[int, float],
) -> Measured:
    """Return rates with their machine and workload, converted to JSON's types.

    The padding token is left out, because it doesn't change the speed.
    """
    fields = dataclasses.asdict(dataclasses.replace(model, pad_token_id=None))
    return Measured(
        machine,
        str(torch.__version__),
        json.loads(json.dumps(fields)),
        seq_len,
        {name: speed[name] for name in MICRO_BATCH_KEYS},
        rates,
    )


def remember(found: Measured) -> None:
    """Save measurements in the file, replacing earlier ones of the same machine and workload."""
    others = [each for each in read_measured() if not each.is_of_the_same(found)]
    MEASURED.parent.mkdir(parents=True, exist_ok=True)
    entries = [dataclasses.asdict(each) for each in (*others, found)]
    write_whole(MEASURED, json.dumps(entries, indent=2) + "\n")


def recall(like: Measured) -> dict[int, float]:
    """Return measured tokens/s by micro-batch for the same workload; empty if there are none."""
    return next(
        (each.tokens_per_second for each in read_measured() if each.is_of_the_same(like)), {}
    )


def read_measured() -> list[Measured]:
    """Return all measurements in the file; an empty list without a file. Raises ConfigError if the
    file is damaged."""
    if not MEASURED.is_file():
        return []
    try:
        return [
            Measured(**each | {"tokens_per_second": _by_size(each["tokens_per_second"])})
            for each in json.loads(MEASURED.read_text())
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{MEASURED}: damaged; remove it, and measure again with pretrain benchmark "
            "--find-micro-batch"
        ) from None


def _by_size(rates: dict[str, float]) -> dict[int, float]:
    return {int(size): float(rate) for size, rate in rates.items()}
