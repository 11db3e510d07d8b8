"""The tokenized dataset on disk.

    data/NAME/
    ├── dataset.json            manifest: tokenizer, totals, sources, shards with checksums
    ├── tokenizer.json          the tokenizer itself, and tokenizer_config.json
    ├── files.jsonl             files of the corpus: size, checksum, tokens of each
    ├── encoding.json           the encoder that made the tokens, and its rate
    ├── train-00000.bin         tokens, little-endian uint16 or uint32 by vocabulary
    ├── train-00000.idx         start of each document, little-endian uint64
    ├── train-00000.crc         CRC-32 of each 64 KiB of the .bin, to locate damage
    └── val-00000.bin, …

Documents are concatenated, each with its marks. A shard ends after a fixed number of tokens, even
inside a document; that document is listed in the index of the shard where it begins.
"""

import array
import copy
import gc
import hashlib
import itertools
import json
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pretrain_cli.data.mapped_files import MappedFiles, sizes_and_times
from pretrain_cli.errors import DataError

FORMAT_VERSION = 2
MANIFEST = "dataset.json"
FILES = "files.jsonl"
PARTIAL = ".partial"
"""Suffix of the folder of a dataset in the making."""
SHARD_TOKENS = 2**27
BLOCK_BYTES = 2**16
"""Bytes of a shard that share one checksum."""

SplitName = Literal["train", "val"]
TokenType = Literal["uint16", "uint32"]


class Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    split: SplitName
    tokens: int
    documents: int
    """Documents that begin in this shard."""
    largest_token: int
    sha256: str
    index_sha256: str
    blocks_sha256: str
    """SHA-256 of the .crc file."""

    @property
    def index(self) -> str:
        """Return the name of the document index."""
        return self.file.removesuffix(".bin") + ".idx"

    @property
    def blocks(self) -> str:
        """Return the name of the file with the checksums of blocks."""
        return self.file.removesuffix(".bin") + ".crc"


class Amount(BaseModel):
    """Amount of text; `bytes` are UTF-8, without document marks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: int = 0
    documents: int = 0
    bytes: int = 0
    tokens: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        names = type(self).model_fields
        return Amount(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Manifest(BaseModel):
    """Contents of dataset.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: TokenType
    beginning_of_document: int | None
    end_of_document: int
    paths: list[str]
    """Corpus paths as the user gave them; of an appended dataset, all of them."""
    options: dict[str, Any]
    """Options requested. The same options and files need no second run."""
    splits: dict[SplitName, Amount]
    sources: dict[str, Amount]
    duplicates: int
    """Documents left out as duplicates."""
    inexact_cuts: int
    """Cuts inside a document for which no exact place was found; see chunking.py."""
    remarks: dict[str, int]
    """Documents that were left out or changed, by reason."""
    files_sha256: str
    """SHA-256 of files.jsonl."""
    shards: list[Shard]

    @property
    def total(self) -> Amount:
        return sum(self.splits.values(), Amount())

    @property
    def largest_token(self) -> int:
        return max(shard.largest_token for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, their order and the tokenizer. Determines the data order."""
        parts = [self.tokenizer_fingerprint, self.dtype]
        parts += [f"{shard.file} {shard.sha256}" for shard in self.shards]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@contextmanager
def without_garbage_collection() -> Generator[None]:
    """Suspend the garbage collector, which visits every object again and again while many are made:
    a third of the time that a manifest of 100,000 shards takes."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@without_garbage_collection()
def read_manifest(folder: Path) -> Manifest:
    """Read dataset.json of a folder."""
    path = folder / MANIFEST
    if not folder.exists():
        raise DataError(f"{folder}: no such dataset; make one with 'pretrain tokenize'")
    if not path.is_file():
        raise DataError(f"{folder}: no {MANIFEST} in it; make a dataset with 'pretrain tokenize'")
    text = path.read_text()
    try:
        manifest = Manifest.model_validate_json(text)
        version = manifest.format_version
    except ValidationError:
        manifest, version = None, _version_in(text)
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {version}, and this version of pretrain reads "
            f"{FORMAT_VERSION}; use the one that wrote it, or tokenize again"
        )
    if manifest is None:
        raise DataError(f"{path}: damaged; tokenize again with --force")
    return manifest


def _version_in(text: str) -> Any:
    """Return the format version in a text that is not a manifest of this version; this version if
    the text is not even JSON."""
    try:
        return json.loads(text).get("format_version")
    except (ValueError, AttributeError):
        return FORMAT_VERSION


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a folder's files.jsonl."""
    with (folder / FILES).open("rb") as file:
        yield from map(json.loads, file)


def token_dtype(vocab_size: int) -> TokenType:
    """Return the narrowest type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def index_path(shard: Path) -> Path:
    """Return the path of a shard's document index."""
    return shard.with_suffix(".idx")


def blocks_path(shard: Path) -> Path:
    """Return the path of the checksums of a shard's blocks."""
    return shard.with_suffix(".crc")


class Checksums:
    """Checksums of a stream of bytes: SHA-256 of the whole and CRC-32 of each block."""

    def __init__(self) -> None:
        self.whole = hashlib.sha256()
        self.blocks = array.array("I")
        self.filled = BLOCK_BYTES
        """Bytes in the last block."""

    def add(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self.whole.update(view)
        while len(view):
            if self.filled == BLOCK_BYTES:
                self.blocks.append(0)
                self.filled = 0
            part = view[: BLOCK_BYTES - self.filled]
            self.blocks[-1] = zlib.crc32(part, self.blocks[-1])
            self.filled += len(part)
            view = view[len(part) :]

    def blocks_bytes(self) -> bytes:
        return np.asarray(self.blocks, dtype="<u4").tobytes()


class TokenStream:
    """Tokens of one split as one long row, read from memory-mapped shards."""

    def __init__(
        self,
        paths: Sequence[Path | str],
        dtype: str,
        *,
        header: int = 0,
        lengths: Sequence[int] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Tokens start after `header` bytes in each file. Raises DataError if a file is missing or,
        where the manifest's `lengths` in tokens are given, has another size. With a `vocab_size`,
        all ids that are read are checked against it, for files without a manifest."""
        little_endian = np.dtype(dtype).newbyteorder("<")
        sizes, modified = sizes_and_times(paths)
        counts: Sequence[int] = ((sizes - header) // little_endian.itemsize).tolist()
        if lengths is not None:
            counts = lengths
            expected = np.asarray(lengths, np.int64) * little_endian.itemsize + header
            for number in np.flatnonzero(sizes != expected).tolist():
                raise DataError(
                    f"{paths[number]}: {sizes[number]:,} bytes where {MANIFEST} says "
                    f"{expected[number]:,}; tokenize again with --force"
                )
        self.files = MappedFiles(paths, little_endian, counts, header=header, modified=modified)
        self.borders = [0, *itertools.accumulate(counts)]
        self.vocab_size = vocab_size
        self.first, self.last = 0, self.borders[-1]

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def nbytes(self) -> int:
        """Return the bytes of all shards' tokens, also of those outside this part of the row."""
        return self.borders[-1] * self.files.dtype.itemsize

    def part(self, first: int, last: int) -> "TokenStream":
        """Return the tokens [first, last) as a row of their own, in the same files."""
        part = copy.copy(self)
        part.first, part.last = self.first + first, self.first + last
        return part

    def read(self, start: int, count: int) -> np.ndarray:
        """Return `count` tokens from `start` on, or as many as there are, across shard borders.

        -> (count,) int64. Raises DataError if an id exceeds the vocabulary.
        """
        return self.view(start, count).astype(np.int64)

    def view(self, start: int, count: int) -> np.ndarray:
        """Return the same tokens in their on-disk type, without a copy if they lie in one shard."""
        parts = []
        count = min(count, len(self) - start)
        place = self.first + start
        shard = bisect_right(self.borders, place) - 1
        while count > 0:
            offset = place - self.borders[shard]
            part = self.files[shard][offset : offset + count]
            self.check(part, shard, offset)
            parts.append(part)
            place, count, shard = place + len(part), count - len(part), shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def check(self, tokens: np.ndarray, shard: int, offset: int) -> None:
        """Raise DataError if one of these tokens, at `offset` in this shard, exceeds the
        vocabulary."""
        if self.vocab_size is None or tokens.max() < self.vocab_size:
            return
        where = int(np.argmax(tokens >= self.vocab_size))
        raise DataError(
            f"{self.files.paths[shard]}: token {offset + where:,} is {tokens[where]:,}, beyond the "
            f"{self.vocab_size:,} of the tokenizer; give the one that made the file with "
            "--tokenizer, or make the file again if it is damaged"
        )


class DocumentStarts(Protocol):
    """Positions in a split at which documents begin, ascending."""

    def __len__(self) -> int: ...

    def between(self, first: int, last: int) -> np.ndarray:
        """Return the positions in [first, last) at which a document begins. -> (n,) int64."""
        ...


class IndexedStarts:
    """DocumentStarts from the index files of the shards, memory-mapped."""

    def __init__(self, starts: MappedFiles | list[np.ndarray], offsets: Sequence[int]) -> None:
        """`starts` are relative to their shard; `offsets` are the positions at which shards
        begin."""
        self.starts = starts
        self.offsets = offsets
        self.documents = sum(
            starts.lengths if isinstance(starts, MappedFiles) else map(len, starts)
        )

    def __len__(self) -> int:
        return self.documents

    def between(self, first: int, last: int) -> np.ndarray:
        found = []
        shards = range(
            max(bisect_right(self.offsets, first) - 1, 0), bisect_left(self.offsets, last)
        )
        for starts, offset in ((self.starts[shard], self.offsets[shard]) for shard in shards):
            # in the type of the starts; otherwise numpy would copy all of them
            ends = np.clip((first - offset, last - offset), 0, None).astype("<u8")
            low, high = np.searchsorted(starts, ends)
            found.append(starts[low:high].astype(np.int64) + offset)
        return np.concatenate(found) if found else np.empty(0, np.int64)
