"""Shards being written: files of a fixed number of tokens, for each split, with document starts and
checksums. Their extent at one point is enough to continue from there."""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np

from pretrain_cli.data.shards import (
    Checksums,
    IndexedStarts,
    Manifest,
    Shard,
    SplitName,
    TokenStream,
    TokenType,
    blocks_path,
    index_path,
    token_dtype,
)
from pretrain_cli.data.tokenizing.progress import Extent, Tally, WriteState
from pretrain_cli.files import flush, sha256_of

READ_BLOCK = 2**20
"""Tokens read at a time when continuing a shard."""
TAIL_BLOCK = 2**20
"""Tokens moved at a time when the end of one split becomes the other split."""
NEW = ".new"
"""Suffix of a shard that replaces one of the same name once everything is complete."""


class ShardWriter:
    """Writes the tokens of both splits to shards in one folder."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int) -> None:
        self.folder, self.shard_tokens = folder, shard_tokens
        self.name: TokenType = token_dtype(vocab_size)
        self.dtype = np.dtype(self.name).newbyteorder("<")
        self.open: dict[SplitName, OpenShard] = {}
        self.closed: list[Shard] = []
        self.splits: dict[SplitName, Tally] = {"train": Tally(), "val": Tally()}
        self.ending = ".bin"
        """Suffix of shard names."""

    def begin_after(self, manifest: Manifest, folder: Path) -> None:
        """Start after the shards of an existing dataset, which are hard-linked, not copied."""
        for shard in manifest.shards:
            for file in files_of(folder, shard.file):
                _link(file, self.folder / file.name)
        self.closed = list(manifest.shards)
        self.splits = {
            name: Tally(part.documents, part.bytes, part.tokens)
            for name, part in manifest.splits.items()
        }

    def resume(self, written: WriteState, shards: Sequence[Shard]) -> None:
        """Continue from the saved state and finished shards of an earlier writer."""
        self.closed = list(shards[: written.closed])
        unfinished = [extent.file for extent in written.open.values()]
        _remove_shards(self.folder, but=[*(shard.file for shard in self.closed), *unfinished])
        self.splits = {name: replace(tally) for name, tally in written.splits.items()}
        for split, extent in written.open.items():
            path = self.folder / extent.file
            self.open[split] = OpenShard.reopened(split, path, self.dtype, extent)

    def add(self, split: SplitName, tokens: np.ndarray, starts: Sequence[int] | np.ndarray) -> None:
        """Append tokens, and the positions among them at which documents begin."""
        begins = np.asarray(starts, dtype=np.int64)
        tokens = np.ascontiguousarray(tokens, dtype=self.dtype)
        while len(tokens):
            shard = self.open.get(split)
            if shard is not None and shard.tokens >= self.shard_tokens:
                self.closed.append(self.open.pop(split).close())
                shard = None
            if shard is None:
                shard = self.open[split] = self._next_shard(split)
            room = self.shard_tokens - shard.tokens
            here = begins < room
            shard.add(tokens[:room], begins[here])
            self.splits[split].tokens += len(tokens[:room])
            self.splits[split].documents += int(here.sum())
            tokens, begins = tokens[room:], begins[~here] - room

    @property
    def settled(self) -> list[Shard]:
        """Finished shards under their final names, in order."""
        shards = (s.model_copy(update={"file": s.file.replace(NEW, "")}) for s in self.closed)
        return sorted(shards, key=lambda shard: shard.file)

    def flush(self) -> None:
        for shard in self.open.values():
            shard.flush()

    def close(self) -> None:
        self.closed += [shard.close() for shard in self.open.values()]
        self.open.clear()

    def abandon(self) -> None:
        for shard in self.open.values():
            shard.abandon()

    def hold_out_tail(self, fraction: float, decode: Callable[[Sequence[int]], str]) -> None:
        """Make the last tokens the validation split and all others the training split, for a corpus
        whose documents all fell into one split. May cut a document."""
        self.close()
        self.closed = [self._as_training(shard) for shard in self.closed]
        whole = max(self.splits.values(), key=lambda tally: tally.tokens)
        self.splits = {"train": whole, "val": Tally()}
        cut = max(1, whole.tokens - max(2, round(whole.tokens * fraction)))

        paths = [self.folder / shard.file for shard in self.closed]
        row = TokenStream(paths, self.name)
        index = [np.fromfile(index_path(path), "<u8") for path in paths]
        offsets = row.borders
        starts = IndexedStarts(index, offsets[:-1])
        text_bytes = 0
        # saved progress refers to the old shards: they stay unchanged until the manifest is written
        self.ending = f"{NEW}.bin"
        for first in range(cut, whole.tokens, TAIL_BLOCK):
            last = min(first + TAIL_BLOCK, whole.tokens)
            begins = starts.between(first, last) - first
            if first == cut and 0 not in begins:
                begins = np.concatenate(([0], begins))  # the rest of a cut document begins here
            tokens = row.read(first, last - first)
            self.add("val", tokens, begins)
            text_bytes += len(decode(tokens.tolist()).encode())
        self.splits["val"].bytes = min(text_bytes, whole.bytes)

        # for the same reason, truncate a copy of the shard that contains the cut
        kept = int(np.searchsorted(offsets[1:], cut))
        extent = Extent(
            file=f"train-{kept:05d}{NEW}.bin",
            tokens=cut - offsets[kept],
            documents=len(starts.between(offsets[kept], cut)),
        )
        path = self.folder / extent.file
        shutil.copyfile(paths[kept], path)
        shutil.copyfile(index_path(paths[kept]), index_path(path))
        self.open["train"] = OpenShard.reopened("train", path, self.dtype, extent)
        before = sum(shard.documents for shard in self.closed[:kept])
        self.closed = [
            *self.closed[:kept],
            *(shard for shard in self.closed if shard.split == "val"),
        ]
        self.splits["train"] = Tally(
            documents=before + extent.documents,
            bytes=whole.bytes - self.splits["val"].bytes,
            tokens=cut,
        )

    def _next_shard(self, split: SplitName) -> "OpenShard":
        number = sum(shard.split == split for shard in self.closed)
        name = f"{split}-{number:05d}{self.ending}"
        for path in files_of(self.folder, name):
            path.unlink(missing_ok=True)
        return OpenShard(split, self.folder / name, self.dtype)

    def _as_training(self, shard: Shard) -> Shard:
        if shard.split == "train":
            return shard
        for path in files_of(self.folder, shard.file):
            _link(path, path.with_name(path.name.replace("val-", "train-")))
        name = shard.file.replace("val-", "train-")
        return shard.model_copy(update={"file": name, "split": "train"})


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
        blocks_path(self.path).write_bytes(self.checksums.blocks_bytes())
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


def are_on_disk(folder: Path, written: WriteState, shards: Sequence[Shard]) -> bool:
    """Return whether a folder has all files of a saved state, at least as long as they were."""
    names = (shard.file for shard in shards[: written.closed])
    sizes = {file: 0 for name in names for file in files_of(folder, name)}
    for extent in written.open.values():
        path = folder / extent.file
        sizes[path] = extent.tokens * np.dtype(written.dtype).itemsize
        sizes[index_path(path)] = extent.documents * 8
    return all(path.exists() and path.stat().st_size >= size for path, size in sizes.items())


def settle_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Give the shards of a complete dataset their final names, and remove all others."""
    for path in folder.glob(f"*{NEW}.*"):
        path.replace(path.with_name(path.name.replace(NEW, "")))
    _remove_shards(folder, but=[shard.file for shard in shards])


def files_of(folder: Path, shard: str) -> tuple[Path, Path, Path]:
    """Return the files of a shard."""
    path = folder / shard
    return path, index_path(path), blocks_path(path)


def _remove_shards(folder: Path, *, but: Sequence[str]) -> None:
    kept = {file for shard in but for file in files_of(folder, shard)}
    for path in folder.iterdir():
        if path.suffix in (".bin", ".idx", ".crc") and path not in kept:
            path.unlink()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or no support for links
        shutil.copyfile(source, target)
