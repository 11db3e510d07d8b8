"""An opened dataset, as training, evaluation and inspection use it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from pretrain_cli.data.mapped_files import MappedFiles
from pretrain_cli.data.shards import (
    BLOCK_BYTES,
    FILES,
    MANIFEST,
    Checksums,
    DocumentStarts,
    IndexedStarts,
    Manifest,
    SplitName,
    TokenStream,
    blocks_path,
    read_manifest,
    without_garbage_collection,
)
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer, read_tokenizer
from pretrain_cli.errors import DataError
from pretrain_cli.files import sha256_of

DECODED = 2**21
"""Maximum number of tokens decoded to measure the bytes of their text."""
DECODED_AT_ONCE = 2**16
VERIFIED_WHEN_OPENED = 4 * 2**30
"""Datasets up to this many bytes have their checksums verified at every opening, at about a second
a gigabyte."""
SHARDS_VERIFIED = 10_000
"""Datasets of more shards are not verified when they are opened, however small they are."""


@dataclass(frozen=True)
class Split:
    """Tokens of one split as one long row, with the positions at which documents begin."""

    tokens: TokenStream
    documents: DocumentStarts
    bytes: int
    """UTF-8 bytes of the text, without document marks."""
    left_out: int = 0
    """Tokens of the whole split after these, if this is a prefix of it."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)

    def iter_documents(self) -> Iterator[np.ndarray]:
        """Yield the tokens of each document, with its marks, in order. A part of a document at the
        beginning of the split counts as one."""
        begin = 0
        for first in range(0, len(self.tokens), DECODED_AT_ONCE):
            last = min(first + DECODED_AT_ONCE, len(self.tokens))
            for end in self.documents.between(max(first, 1), last).tolist():
                yield self.tokens.read(begin, end - begin)
                begin = end
        if begin < len(self.tokens):
            yield self.tokens.read(begin, len(self.tokens) - begin)

    def prefix(self, tokens: int, tokenizer: Tokenizer) -> "Split":
        """Return the first `tokens` tokens, if there are more. Their text is decoded to measure its
        bytes."""
        if tokens >= len(self.tokens):
            return self
        row = self.tokens.part(0, tokens)
        size = text_bytes(row, self.documents, tokenizer)
        return Split(row, self.documents, size, left_out=len(self.tokens) - tokens)


@dataclass(frozen=True)
class Dataset:
    """A tokenized dataset, opened and checked."""

    path: Path
    """Path as given: a folder, or the file or pattern of another program's token files."""
    name: str
    """Name for runs on this dataset."""
    tokenizer: Tokenizer
    separator: int
    """Token id between two documents."""
    fingerprint: str
    """Hash of the tokens, their order and the tokenizer. Determines the data order."""
    largest_token: int
    train: Split
    val: Split
    unverified_bytes: int
    """Bytes of files whose size was checked but not their checksums."""
    separator_leads: bool = False
    """True if the separator precedes each document instead of following it."""
    notices: tuple[str, ...] = ()
    """Choices made while opening the dataset that the user should know."""


@without_garbage_collection()
def open_dataset(folder: Path) -> Dataset:
    """Open a dataset. Raises DataError if a file is missing, truncated, altered or swapped. Of a
    very large dataset, the tokenizer and the sizes of shards are checked now, and the size of an
    index file when it is read."""
    manifest = read_manifest(folder)
    size = manifest.total.tokens * np.dtype(manifest.dtype).itemsize
    verified = size <= VERIFIED_WHEN_OPENED and len(manifest.shards) <= SHARDS_VERIFIED
    find = partial(find_damage, thoroughly=True) if verified else _damaged_tokenizer
    for damage in find(folder, manifest):
        raise DataError(f"{damage}; tokenize again with --force")
    tokenizer = read_tokenizer(folder / "tokenizer.json", name=manifest.tokenizer)
    return Dataset(
        folder,
        folder.resolve().name,
        replace(tokenizer, bos=manifest.beginning_of_document, eos=manifest.end_of_document),
        separator=manifest.end_of_document,
        fingerprint=manifest.fingerprint,
        largest_token=manifest.largest_token,
        train=open_split(folder, manifest, "train"),
        val=open_split(folder, manifest, "val"),
        unverified_bytes=0 if verified else size,
    )


def find_damage(folder: Path, manifest: Manifest, *, thoroughly: bool) -> Iterator[str]:
    """Yield one line for each fault of a dataset's files. Sizes are always checked, checksums if
    `thoroughly`. A damaged shard is reported with the position, the recorded checksum and the
    actual one."""
    yield from _damaged_tokenizer(folder, manifest)
    for path, size, checksum in _recorded(folder, manifest):
        try:
            found = os.stat(path).st_size
        except OSError:
            yield f"{path}: missing"
            continue
        if size is not None and found != size:
            yield f"{path}: {found:,} bytes where {MANIFEST} says {size:,}"
        elif thoroughly and path.endswith(".bin"):
            yield from _damaged_blocks(Path(path), checksum)
        elif thoroughly and sha256_of(Path(path)) != checksum:
            yield f"{path}: checksum differs from {MANIFEST}"


def _recorded(folder: Path, manifest: Manifest) -> Iterator[tuple[str, int | None, str]]:
    """Yield (path, bytes, SHA-256) of each file in the manifest. Paths are strings: a Path takes as
    long to make as the file to look up."""
    width = np.dtype(manifest.dtype).itemsize
    yield f"{folder}/{FILES}", None, manifest.files_sha256
    for shard in manifest.shards:
        size = shard.tokens * width
        yield f"{folder}/{shard.file}", size, shard.sha256
        yield f"{folder}/{shard.index}", shard.documents * 8, shard.index_sha256
        yield f"{folder}/{shard.blocks}", -(-size // BLOCK_BYTES) * 4, shard.blocks_sha256


def _damaged_tokenizer(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield a line if the tokenizer is missing or another one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        yield f"{path}: missing"
    elif sha256_of(path) != manifest.tokenizer_fingerprint:
        yield f"{path}: not the tokenizer that made this dataset ({manifest.tokenizer})"


def _damaged_blocks(path: Path, checksum: str) -> Iterator[str]:
    """Yield one line for each run of damaged blocks in a shard."""
    sums = Checksums()
    with path.open("rb") as file:
        while data := file.read(2**20):
            sums.add(data)
    if sums.whole.hexdigest() == checksum:
        return
    try:
        written = np.fromfile(blocks_path(path), dtype="<u4")
    except OSError:
        written = np.empty(0, "<u4")
    found = np.asarray(sums.blocks, dtype="<u4")
    damaged = np.flatnonzero(written != found) if len(written) == len(found) else np.empty(0, int)
    if not len(damaged):
        yield f"{path}: checksum differs from {MANIFEST}"
        return
    rows = np.split(damaged, np.flatnonzero(np.diff(damaged) > 1) + 1)
    for row in rows:
        first, last = int(row[0]), int(row[-1])
        end = min((last + 1) * BLOCK_BYTES, path.stat().st_size)
        yield (
            f"{path}: damaged between bytes {first * BLOCK_BYTES:,} and {end:,} (CRC-32 "
            f"{found[first]:08x} where {written[first]:08x} was written)"
        )


def open_split(folder: Path, manifest: Manifest, name: SplitName) -> Split:
    """Open one split of a dataset. Raises DataError if a shard is missing or has another size."""
    shards = [shard for shard in manifest.shards if shard.split == name]
    tokens = TokenStream(
        [f"{folder}/{shard.file}" for shard in shards],
        manifest.dtype,
        lengths=[shard.tokens for shard in shards],
    )
    starts = MappedFiles(
        [f"{folder}/{shard.index}" for shard in shards],
        np.dtype("<u8"),
        [shard.documents for shard in shards],
    )
    return Split(tokens, IndexedStarts(starts, tokens.borders[:-1]), manifest.splits[name].bytes)


def text_bytes(row: TokenStream, documents: DocumentStarts, tokenizer: Tokenizer) -> int:
    """Return the UTF-8 bytes of the row's text: decoded if it is short, else estimated from evenly
    spaced parts."""
    few = len(row) <= DECODED
    count, parts = (len(row), 1) if few else (DECODED_AT_ONCE, DECODED // DECODED_AT_ONCE)
    size = 0
    for first in np.linspace(0, len(row) - count, parts, dtype=np.int64).tolist():
        cuts = documents.between(first, first + count) - first
        texts = tokenizer.backend.decode_batch(
            [part.tolist() for part in np.split(row.read(first, count), cuts)],
            skip_special_tokens=True,
        )
        size += sum(len(text.encode()) for text in texts)
    return size if few else round(size * len(row) / (count * parts))
