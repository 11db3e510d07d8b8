"""Benchmark of reading batches: in order, as in training, and at random positions, as after a
resume.

Uses the real `Batches` on one thread, on a given or synthetic dataset with a warm page cache.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_cli.data.batches import Batches, Samples, Windows
from pretrain_cli.data.dataset import Split
from pretrain_cli.data.packing import build_index, read_index
from pretrain_cli.data.shards import SHARD_TOKENS, IndexedStarts, TokenStream
from pretrain_cli.errors import ConfigError

SECONDS = 3.0
RANDOM_BATCHES = 1000
RANDOM_SAMPLES = 2**40
"""Range of the random sample numbers: many epochs, so that each read computes another epoch's
order."""
DOCUMENT_TOKENS = 600
"""Mean length of a synthetic document."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Dataset to read, and the batches to read from it."""

    seq_len: int
    samples: int
    """Samples of a batch."""
    packing: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    tokens: int
    size: int
    """Bytes of the tokens."""
    tokens_per_second: float
    """Rate in order."""
    batch_seconds: float
    """Median seconds of a batch at a random position."""
    index_seconds: float | None
    """Seconds to build the index of packed documents; None without packing."""
    filled: float | None
    """Share of positions in samples that hold a token; None without packing."""


def measure(split: Split, workload: Workload) -> Measurement:
    """Read batches of a split for a few seconds."""
    seq_len, index_seconds, filled = workload.seq_len, None, None
    if seq_len >= len(split.tokens):
        raise ConfigError(f"data.seq_len: {seq_len:,} is beyond the {len(split.tokens):,} tokens")
    with tempfile.TemporaryDirectory() as folder:
        samples: Samples = Windows(
            split.tokens, seq_len=seq_len, fingerprint="benchmark", separator=0
        )
        if workload.packing == "best-fit":
            path = Path(folder) / "index"
            began = time.perf_counter()
            build_index(path, split, "benchmark", seq_len)
            index_seconds = time.perf_counter() - began
            samples = read_index(path, split, "benchmark", seq_len)
            filled = samples.totals.share_filled(seq_len)
        batches = Batches(
            [samples], [1], seq_len=seq_len, samples_per_step=workload.samples, seed=0
        )
        _into_the_page_cache(split.tokens.files.paths)
        return Measurement(
            tokens=len(split.tokens),
            size=split.tokens.nbytes,
            tokens_per_second=_in_order(batches, workload),
            batch_seconds=_at_random(batches),
            index_seconds=index_seconds,
            filled=filled,
        )


def _into_the_page_cache(paths: Sequence[str]) -> None:
    """Load a file into the page cache by reading it. Reading through the memory map would also fill
    this process's page table."""
    for path in paths:
        with open(path, "rb") as file:
            while file.read(2**24):
                pass


def _in_order(batches: Batches, workload: Workload) -> float:
    """Return tokens per second."""
    sample, seconds = 0, 0.0
    began = time.perf_counter()
    while seconds < SECONDS:
        batches.starting_at(sample)
        sample += workload.samples
        seconds = time.perf_counter() - began
    return sample * workload.seq_len / seconds


def _at_random(batches: Batches) -> float:
    """Return seconds per batch."""
    times = []
    for sample in np.random.default_rng(0).integers(RANDOM_SAMPLES, size=RANDOM_BATCHES).tolist():
        began = time.perf_counter()
        batches.starting_at(sample)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@contextmanager
def made_split(size: int) -> Generator[Split]:
    """Yield a temporary split of this many bytes: random 16-bit tokens in documents of random
    lengths."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if size > free * 0.9:
        raise ConfigError(
            f"--size: {size / 1e9:g} GB is more than {tempfile.gettempdir()} has free, "
            f"{free / 1e9:.1f} GB; give less, or another place with TMPDIR"
        )
    generator = np.random.default_rng(0)
    block = generator.integers(2**16, size=2**24, dtype=np.uint16)
    paths = []
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, size // 2, SHARD_TOKENS):
            paths.append(Path(folder) / f"{first}.bin")
            np.resize(block, min(SHARD_TOKENS, size // 2 - first)).tofile(paths[-1])
        tokens = TokenStream(paths, "uint16")
        lengths = generator.exponential(DOCUMENT_TOKENS, len(tokens) // DOCUMENT_TOKENS) + 1
        starts = np.cumsum(lengths.astype(np.int64))
        starts = np.concatenate([[0], starts[starts < len(tokens)]])
        yield Split(tokens, IndexedStarts([starts], [0]), bytes=0)
