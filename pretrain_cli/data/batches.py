"""Batches: the batch of a step is a pure function of the datasets, the seed and the sample numbers.

    k-th sample ── order ──> (source, number of one of its samples) ──> inputs and targets

Any rank can read any batch directly from memory-mapped shards. Resuming needs only the number of
samples consumed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pretrain_cli.data.sample_order import Interleaving, Order
from pretrain_cli.data.shards import TokenStream
from pretrain_cli.targets import IGNORE_INDEX


class Samples(Protocol):
    """Samples of one source, by number: `seq_len` inputs, and targets shifted by one token."""

    fingerprint: str
    """Fingerprint of the dataset; with the seed it fixes the order."""

    def __len__(self) -> int: ...

    def targets(self, numbers: np.ndarray) -> int:
        """Return the number of targets in these samples that count in the loss."""
        ...

    def fill(self, numbers: np.ndarray, rows: np.ndarray, batch: "Batch") -> None:
        """Write these samples into the given rows."""
        ...

    def stretches(self, number: int) -> list[tuple[int, int]]:
        """Return where a sample lies in the dataset: (first token, count) of each contiguous
        range."""
        ...


class Windows:
    """Consecutive windows of seq_len + 1 tokens that start every seq_len tokens and ignore document
    boundaries.

    Every token but the first is a target once. Up to seq_len tokens at the end are left over.
    """

    def __init__(
        self,
        tokens: TokenStream,
        *,
        seq_len: int,
        fingerprint: str,
        separator: int,
        separator_leads: bool = False,
    ) -> None:
        self.tokens, self.seq_len, self.fingerprint = tokens, seq_len, fingerprint
        self.separator, self.separator_leads = separator, separator_leads

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.seq_len

    def targets(self, numbers: np.ndarray) -> int:
        return len(numbers) * self.seq_len

    def fill(self, numbers: np.ndarray, rows: np.ndarray, batch: "Batch") -> None:
        for number, row in zip(numbers.tolist(), rows.tolist(), strict=True):
            window = self.tokens.view(number * self.seq_len, self.seq_len + 1)
            batch.inputs[row] = window[:-1]
            batch.targets[row] = window[1:]
        if batch.documents is not None:
            batch.documents[rows] = document_numbers(
                batch.inputs[rows], self.separator, leads=self.separator_leads
            )

    def stretches(self, number: int) -> list[tuple[int, int]]:
        return [(number * self.seq_len, self.seq_len + 1)]


def order_of(samples: Samples, seed: int) -> Order:
    """Return the order in which a run with this seed reads a source's samples."""
    return Order(len(samples), f"{samples.fingerprint} {seed}")


@dataclass
class Batch:
    """One rank's share of a step: int64 arrays of shape (B, T)."""

    inputs: np.ndarray
    targets: np.ndarray
    """Token to predict at each position; IGNORE_INDEX where there is none."""
    documents: np.ndarray | None
    """Document number of each input token; None unless requested."""
    counted: int = 0
    """Number of targets of the whole step, on all ranks, that are not IGNORE_INDEX."""


class Batches:
    """Training samples by number, from sources mixed in proportion to their weights.

    One of `world_size` ranks reads its share of every step.
    """

    def __init__(
        self,
        sources: Sequence[Samples],
        weights: Sequence[int],
        *,
        seq_len: int,
        samples_per_step: int,
        seed: int,
        documents: bool = False,
        rank: int = 0,
        world_size: int = 1,
        before: Sequence[int] | None = None,
    ) -> None:
        """`before` are the samples of each source that an earlier stage of the run took."""
        self.sources = sources
        self.before = np.zeros(len(sources), np.int64) if before is None else np.array(before)
        self.orders = [order_of(samples, seed) for samples in sources]
        self.interleaving = Interleaving(weights)
        self.seq_len = seq_len
        self.samples_per_step = samples_per_step
        self.documents = documents
        share = samples_per_step // world_size
        self.first, self.last = rank * share, (rank + 1) * share

    def step(self, number: int) -> Batch:
        """Return this rank's share of a step, counted from 0. Rolling back shifts later steps."""
        return self.starting_at(number * self.samples_per_step)

    def starting_at(self, sample: int) -> Batch:
        """Return this rank's share of the step that starts at this sample number."""
        shape = (self.last - self.first, self.seq_len)
        inputs, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        batch = Batch(inputs, targets, np.empty(shape, np.int64) if self.documents else None)
        step = np.arange(sample, sample + self.samples_per_step)
        chosen, numbers = self.interleaving(step)
        for source, (samples, order) in enumerate(zip(self.sources, self.orders, strict=True)):
            (places,) = np.nonzero(chosen == source)
            wanted = order(numbers[places] + self.before[source])
            batch.counted += samples.targets(wanted)
            mine = slice(*np.searchsorted(places, (self.first, self.last)))
            samples.fill(wanted[mine], places[mine] - self.first, batch)
        return batch

    def sample(self, number: int) -> tuple[int, np.ndarray]:
        """Return one sample, which may belong to any rank: its source and its inputs (T,)."""
        chosen, within = self.interleaving(np.array([number]))
        source = int(chosen[0])
        shape = (1, self.seq_len)
        batch = Batch(np.empty(shape, np.int64), np.empty(shape, np.int64), None)
        wanted = self.orders[source](within + self.before[source])
        self.sources[source].fill(wanted, np.array([0]), batch)
        return source, batch.inputs[0]

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first samples come from each source."""
        return self.interleaving.counts(samples)


def validation_batches(
    tokens: TokenStream, *, seq_len: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield a split in batches of one shape; every token but the first is a target exactly once.

    Ranks take batches in turn. The last batch is padded, and empty batches are added so that all
    ranks have equally many; padding targets are IGNORE_INDEX.
    """
    total = max(len(tokens) - 1, 0)  # targets
    windows = -(-total // seq_len)
    batches = -(-windows // batch_size)
    for number in range(rank, -(-batches // world_size) * world_size, world_size):
        inputs = np.zeros((batch_size, seq_len), dtype=np.int64)
        targets = np.full((batch_size, seq_len), IGNORE_INDEX, dtype=np.int64)
        for row in range(batch_size):
            start = (number * batch_size + row) * seq_len
            if start >= total:
                break
            window = tokens.read(start, seq_len + 1)
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        yield inputs, targets


def document_numbers(tokens: np.ndarray, separator: int, *, leads: bool) -> np.ndarray:
    """Number the documents of each row, in order. (..., T) -> (..., T) int64.

    A document ends with its separator or, if the separator `leads`, begins with it. A document cut
    by the start of the row is number 0.

    tokens     o  c  a  t  ▪  d  o  g  ▪  ▪  e
    ends       0  0  0  0  0  1  1  1  1  2  3
    leads      0  0  0  0  1  1  1  1  2  3  3

    Targets stay as they are: the last token of a document still predicts the first of the next one.
    For a tokenizer without a BOS token, this teaches the model how a document begins. It also keeps
    the number of targets per step constant.
    """
    separators = tokens == separator
    numbers = separators.cumsum(-1)
    return numbers if leads else numbers - separators
