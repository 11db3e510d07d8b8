"""Choose the micro-batch: the sequences that a rank computes at once. It changes time and memory,
and the result by rounding alone, since a step's loss is the mean over its tokens.

    as asked
    else what the run had, where it goes on on the same machine: it repeats bit for bit
    else the fastest that was measured here, of this model, length and settings
    else the largest

of those that divide a rank's share of the step and whose estimated memory fits. What `pretrain
benchmark --find-micro-batch` measured is in runs/micro-batches.json.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain_cli.engine.planning.memory_estimate import USABLE_FRACTION
from pretrain_cli.engine.runtime.host_memory import available_memory
from pretrain_cli.errors import ConfigError
from pretrain_cli.files import write_whole
from pretrain_cli.model.config import ModelConfig

MEASURED = Path("runs/micro-batches.json")
MICRO_BATCH_KEYS = (
    "attention", "dtype", "onednn_matmul", "compile", "chunked_loss", "activation_checkpointing",
)  # fmt: skip
"""Speed settings by which another size may be the fastest."""
TIE_TOLERANCE = 0.02
"""Rates that differ by less are alike, and the smaller micro-batch does."""
ASSUMED_FREE_BYTES = 8 * 10**9
"""Bytes, taken for free where the system doesn't say."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch, and why it is that."""

    size: int
    reason: str
    """Empty where it was asked for."""


def choose_micro_batch(
    share: int,
    bytes_of: Callable[[int], int],
    room: float,
    *,
    had: int | None = None,
    rates: dict[int, float] | None = None,
) -> MicroBatch:
    """Choose from a rank's share of a step. `rates` are measured tokens/s by size; `had` is the
    run's earlier size on this machine."""
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    if had in sizes:
        return MicroBatch(had, "as before")
    fitting = [size for size in sizes if bytes_of(size) <= room] or [1]
    measured = {size: (rates or {})[size] for size in fitting if size in (rates or {})}
    if measured:
        return MicroBatch(fastest(measured), "the fastest measured here")
    return MicroBatch(max(fitting), "by the estimate of memory")


def fastest(rates: dict[int, float]) -> int:
    """The smallest micro-batch that is about as fast as any."""
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= (1 - TIE_TOLERANCE) * best)


def memory_here(device: torch.device) -> float:
    """Bytes that a run may take of the device's memory: of what is free, all but a margin."""
    if device.type == "cuda":
        return USABLE_FRACTION * torch.cuda.mem_get_info(device)[0]
    return USABLE_FRACTION * (available_memory() or ASSUMED_FREE_BYTES)


# --- what was measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Tokens/s by micro-batch, and what they are of."""

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
    """Rates with what they are of, in JSON's own types. The padding token costs nothing."""
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
    """Add it to the file, in the place of an earlier one of the same."""
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
    """All that the file has; none where there is no file."""
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
