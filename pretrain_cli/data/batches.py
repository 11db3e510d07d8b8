"""Batches of a step: a pure function of the datasets, the seed and the step's sample numbers.

    k-th sample ── order ──> (source, number of one of its samples) ──> inputs and targets

Any batch is read at once, on any rank, from memory-mapped shards, and there is nothing to save but
the count of samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pretrain_cli.data.sample_order import Interleaving, Order
from pretrain_cli.data.shards import TokenStream

IGNORE_INDEX = -100


class Samples(Protocol):
    """One source's samples by number: seq_len inputs each and, one token on, targets."""

    fingerprint: str
    """Fingerprint of the dataset; with the seed it fixes the order."""

    def __len__(self) -> int: ...

    def targets(self, numbers: np.ndarray) -> int:
        """Return the number of targets in these samples that count in the loss."""
        ...

    def fill(self, numbers: np.ndarray, rows: np.ndarray, batch: "Batch") -> None:
        """Write these samples into these rows."""
        ...

    def stretches(self, number: int) -> list[tuple[int, int]]:
        """Return a sample's places in the dataset: (first token, count) of each stretch."""
        ...


class Windows:
    """The tokens in windows of seq_len + 1, one every seq_len, wherever documents begin and end.

    Every token but the first is a target once; fewer than seq_len are left over at the end.
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
    """The order in which a run of this seed takes a source's samples."""
    return Order(len(samples), f"{samples.fingerprint} {seed}")


@dataclass
class Batch:
    """A rank's share of a step: arrays of (B, T) int64."""

    inputs: np.ndarray
    targets: np.ndarray
    """IGNORED where there is nothing to predict."""
    documents: np.ndarray | None
    """Document number of each input; None unless requested."""
    counted: int = 0
    """Targets of the whole step, on all ranks, that are not IGNORED."""


class Batches:
    """Training samples by number, of sources that are mixed in proportion to their weights.

    One rank of `world_size` reads its share of every step.
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
    ) -> None:
        self.sources = sources
        self.orders = [order_of(samples, seed) for samples in sources]
        self.interleaving = Interleaving(weights)
        self.seq_len = seq_len
        self.samples_per_step = samples_per_step
        self.documents = documents
        share = samples_per_step // world_size
        self.first, self.last = rank * share, (rank + 1) * share

    def starting_at(self, sample: int) -> Batch:
        """This rank's share of the step whose first sample has this number."""
        shape = (self.last - self.first, self.seq_len)
        inputs, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        batch = Batch(inputs, targets, np.empty(shape, np.int64) if self.documents else None)
        step = np.arange(sample, sample + self.samples_per_step)
        chosen, numbers = self.interleaving(step)
        for source, (samples, order) in enumerate(zip(self.sources, self.orders, strict=True)):
            (places,) = np.nonzero(chosen == source)
            wanted = order(numbers[places])
            batch.counted += samples.targets(wanted)
            mine = slice(*np.searchsorted(places, (self.first, self.last)))
            samples.fill(wanted[mine], places[mine] - self.first, batch)
        return batch

    def sample(self, number: int) -> tuple[int, np.ndarray]:
        """One sample, of whichever rank: the source that it is of, and its inputs. (T,)"""
        chosen, within = self.interleaving(np.array([number]))
        source = int(chosen[0])
        shape = (1, self.seq_len)
        batch = Batch(np.empty(shape, np.int64), np.empty(shape, np.int64), None)
        self.sources[source].fill(self.orders[source](within), np.array([0]), batch)
        return source, batch.inputs[0]


def validation_batches(
    tokens: TokenStream, *, seq_len: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every token of a split but the first as a target exactly once, in batches of one shape.

    Ranks take batches in turn. What is short at the end, and whole batches that even the ranks out,
    are filled with targets that are not counted.
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

    A document ends with its separator or, where that `leads`, begins with it. Of a document that
    the row's start cuts, the rest is one.

        tokens     o  c  a  t  ▪  d  o  g  ▪  ▪  e
        ends       0  0  0  0  0  1  1  1  1  2  3
        leads      0  0  0  0  1  1  1  1  2  3  3

    The targets stay as they are: the last token of a document still predicts the first of the next.
    For a tokenizer without a beginning mark, that is how text sampled from nothing begins; and
    every step's loss stays a mean over as many tokens.
    """
    separators = tokens == separator
    numbers = separators.cumsum(-1)
    return numbers if leads else numbers - separators
