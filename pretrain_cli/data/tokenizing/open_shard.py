"""A shard being written: its tokens, the positions of its documents, and its checksums."""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from pretrain_cli.data.shards import Checksums, Shard, SplitName, blocks_path, index_path
from pretrain_cli.files import flush, sha256_of

READ_BLOCK = 2**20
"""Tokens read at a time when continuing a shard."""


@dataclass(frozen=True)
class Extent:
    """Extent of an unfinished shard."""

    file: str
    tokens: int
    documents: int


@dataclass
class OpenShard:
    """A shard being written."""

    split: SplitName
    path: Path
    dtype: np.dtype
    tokens: int = 0
    documents: int = 0
    largest: int = 0
    checksums: Checksums = field(default_factory=Checksums)

    def __post_init__(self) -> None:
        self.data: IO[bytes] = self.path.open("ab")
        self.index: IO[bytes] = index_path(self.path).open("ab")

    @classmethod
    def reopened(cls, split: SplitName, path: Path, dtype: np.dtype, extent: Extent) -> "OpenShard":
        """Reopen a shard, truncated to an earlier extent."""
        os.truncate(path, extent.tokens * dtype.itemsize)
        os.truncate(index_path(path), extent.documents * 8)
        shard = cls(split, path, dtype, extent.tokens, extent.documents)
        with path.open("rb") as file:  # not mapped: pages of a map count as this process's memory
            while len(part := np.fromfile(file, dtype, READ_BLOCK)):
                shard.checksums.add(part)
                shard.largest = max(shard.largest, int(part.max()))
        return shard

    def add(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        self.data.write(tokens.data)
        self.checksums.add(tokens)
        if len(starts):
            self.index.write((starts + self.tokens).astype("<u8").tobytes())
        self.tokens += len(tokens)
        self.documents += len(starts)
        self.largest = max(self.largest, int(tokens.max()))

    @property
    def extent(self) -> Extent:
        return Extent(self.path.name, self.tokens, self.documents)

    def flush(self) -> None:
        flush(self.data)
        flush(self.index)

    def close(self) -> Shard:
        self.flush()
        self.abandon()
        blocks = self.checksums.blocks_bytes()
        blocks_path(self.path).write_bytes(blocks)
        return Shard(
            file=self.path.name,
            split=self.split,
            tokens=self.tokens,
            documents=self.documents,
            largest_token=self.largest,
            sha256=self.checksums.whole.hexdigest(),
            index_sha256=sha256_of(index_path(self.path)),
            blocks_sha256=sha256_of(blocks_path(self.path)),
        )

    def abandon(self) -> None:
        close_anyhow(self.data)
        close_anyhow(self.index)


def close_anyhow(file: IO[bytes]) -> None:
    """Close a file whose contents are already on disk, or not needed. With a full disk, flushing at
    close would fail."""
    with suppress(OSError):
        file.close()
