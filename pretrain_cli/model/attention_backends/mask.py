"""Causal masks with windows and documents, as every attention backend gets them."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents of a batch. Attention stays inside each of them."""

    numbers: Tensor
    """Document number of each token, (B, S). The tokens of a document are adjacent."""
    counts: tuple[int, ...] | None = None
    """Number of documents in each row; None if they have to be counted, for which the CPU waits for
    a GPU."""

    @property
    def count(self) -> int:
        """Number of documents in all rows."""
        return int(self.starts.sum()) if self.counts is None else sum(self.counts)

    @functools.cached_property
    def starts(self) -> Tensor:
        """True where a document starts, (B, S). A row's first token starts one."""
        starts = torch.ones_like(self.numbers, dtype=torch.bool)
        starts[:, 1:] = self.numbers[:, 1:] != self.numbers[:, :-1]
        return starts

    def __getitem__(self, rows: slice) -> "Documents":
        return Documents(self.numbers[rows], None if self.counts is None else self.counts[rows])


@dataclass(frozen=True)
class Mask:
    """Causal mask: query i of T, at position S − T + i, sees all keys up to its position, or the
    last `window` of them, itself included. With `documents`, it sees only keys of its own
    document."""

    queries: int
    keys: int
    window: int | None
    documents: Documents | None = None
    rows: int = 1
    """Number of rows of the batch, B."""

    @property
    def is_plain_causal(self) -> bool:
        """True if neither a window nor documents hide any earlier key."""
        return self.documents is None and (self.window is None or self.window >= self.keys)

    def matrix(self, device: torch.device) -> Tensor:
        """Return a boolean matrix, True where a query sees a key. (1, T, S); with documents (B, T,
        S)."""
        key = torch.arange(self.keys, device=device)
        query = torch.arange(self.keys - self.queries, self.keys, device=device).unsqueeze(-1)
        seen = key <= query
        if self.window is not None:
            seen = seen & (key > query - self.window)
        if self.documents is None:
            return seen.unsqueeze(0)
        numbers = self.documents.numbers
        query_numbers = numbers[:, self.keys - self.queries :]
        return seen & (query_numbers.unsqueeze(-1) == numbers.unsqueeze(-2))
