"""The tokenized dataset on disk.

    data/NAME/
    ├── dataset.json            what it is: tokenizer, totals, shards with sizes and checksums
    ├── tokenizer.json          the tokenizer itself, and tokenizer_config.json
    ├── train-00000.bin         tokens, little-endian uint16 or uint32 by vocabulary
    ├── train-00000.idx         where each document begins, little-endian uint64
    └── val-00000.bin, .idx

Documents are concatenated, each with its marks. A dataset is written aside and renamed when whole:
a folder with a dataset.json is complete.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pretrain_cli.data.tokenizer import Tokenizer
from pretrain_cli.errors import DataError
from pretrain_cli.files import flush

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
SHARD_TOKENS = 2**27

SplitName = Literal["train", "val"]
TokenType = Literal["uint16", "uint32"]


class Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    split: SplitName
    tokens: int
    documents: int
    bytes: int
    """Of the text, in UTF-8, without document marks."""
    largest_token: int
    sha256: str
    index_sha256: str


class Manifest(BaseModel):
    """dataset.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: TokenType
    beginning_of_document: int | None
    end_of_document: int
    sources: dict[str, Any]
    """What was asked for: paths, digest of the files, options. The same request needs no work."""
    shards: list[Shard]

    def total(self, split: SplitName, of: Literal["tokens", "documents", "bytes"]) -> int:
        return sum(getattr(shard, of) for shard in self.shards if shard.split == split)

    @property
    def largest_token(self) -> int:
        return max(shard.largest_token for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Changes with any token, with their order and with the tokenizer. Fixes the data order."""
        parts = [self.tokenizer_fingerprint, self.dtype]
        parts += [f"{shard.file} {shard.sha256}" for shard in self.shards]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """dataset.json of a folder."""
    path = folder / MANIFEST
    if not folder.exists():
        raise DataError(f"{folder}: no such dataset; make one with 'pretrain tokenize'")
    if not path.is_file():
        raise DataError(f"{folder}: no {MANIFEST} in it; make a dataset with 'pretrain tokenize'")
    try:
        raw = json.loads(path.read_text())
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: format version {version}, and this version of pretrain reads "
                f"{FORMAT_VERSION}; use the one that wrote it, or tokenize again"
            )
        return Manifest.model_validate(raw)
    except (ValueError, AttributeError, ValidationError):
        raise DataError(f"{path}: damaged; tokenize again with --force") from None


def token_dtype(vocab_size: int) -> TokenType:
    """The narrower type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class TokenStream:
    """One split's tokens as one long row, read from memory-mapped shards."""

    def __init__(
        self, paths: list[Path], dtype: str, *, header: int = 0, vocab_size: int | None = None
    ) -> None:
        """In each file, tokens begin behind `header` bytes. With a `vocab_size`, whatever is read
        is checked against it: for files that no manifest speaks for."""
        little_endian = np.dtype(dtype).newbyteorder("<")
        self.paths = paths
        self.shards = [np.memmap(path, little_endian, "r", offset=header) for path in paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)
        self.vocab_size = vocab_size
        self.first, self.last = 0, int(self.ends[-1]) if paths else 0

    def __len__(self) -> int:
        return self.last - self.first

    def part(self, first: int, last: int) -> "TokenStream":
        """The tokens [first, last) as a row of their own, in the same files."""
        part = copy.copy(self)
        part.first, part.last = self.first + first, self.first + last
        return part

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on, across shard borders, or those that there are.

        -> (count,) int64. DataError where an id is beyond the vocabulary.
        """
        parts = []
        count = min(count, len(self) - start)
        place = self.first + start
        shard = int(np.searchsorted(self.ends, place, side="right"))
        while count > 0:
            offset = place - (int(self.ends[shard - 1]) if shard else 0)
            part = self.shards[shard][offset : offset + count]
            self.check(part, shard, offset)
            parts.append(part)
            place, count, shard = place + len(part), count - len(part), shard + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def check(self, tokens: np.ndarray, shard: int, offset: int) -> None:
        """Refuse these tokens, which stand in this shard from `offset` on, where one of them is
        beyond the vocabulary."""
        if self.vocab_size is None or tokens.max() < self.vocab_size:
            return
        where = int(np.argmax(tokens >= self.vocab_size))
        raise DataError(
            f"{self.paths[shard]}: token {offset + where:,} is {tokens[where]:,}, beyond the "
            f"{self.vocab_size:,} of the tokenizer; give the one that made the file with "
            "--tokenizer, or make the file again if it is damaged"
        )


class DocumentStarts(Protocol):
    """Where one split's documents begin in its row of tokens, ascending."""

    def __len__(self) -> int: ...

    def between(self, first: int, last: int) -> np.ndarray:
        """The positions in [first, last) at which a document begins. -> (n,) int64."""
        ...


class IndexedStarts:
    """DocumentStarts from the index files of the shards, memory-mapped."""

    def __init__(self, starts: list[np.ndarray], offsets: Sequence[int]) -> None:
        """`starts` are relative to their shard, and `offsets` say where each shard begins."""
        self.starts = starts
        self.offsets = offsets

    def __len__(self) -> int:
        return sum(len(starts) for starts in self.starts)

    def between(self, first: int, last: int) -> np.ndarray:
        found = []
        for starts, offset in zip(self.starts, self.offsets, strict=True):
            low, high = np.searchsorted(starts, np.clip((first - offset, last - offset), 0, None))
            found.append(starts[low:high].astype(np.int64) + offset)
        return np.concatenate(found) if found else np.empty(0, np.int64)


def index_path(shard: Path) -> Path:
    """The document index of a shard."""
    return shard.with_suffix(".idx")


@dataclass
class _OpenShard:
    """A shard being written."""

    split: SplitName
    path: Path
    dtype: str
    tokens: int = 0
    largest: int = 0
    starts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.file = self.path.open("wb")
        self.checksum = hashlib.sha256()

    def add(self, ids: Sequence[int] | np.ndarray, size: int) -> None:
        values = np.asarray(ids, dtype=np.int64)
        data = values.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes()
        self.file.write(data)
        self.checksum.update(data)
        self.starts.append(self.tokens)
        self.sizes.append(size)
        self.tokens += len(ids)
        self.largest = max(self.largest, int(values.max()))

    def close(self) -> Shard:
        flush(self.file)
        self.file.close()
        index = np.asarray(self.starts, dtype="<u8").tobytes()
        with index_path(self.path).open("wb") as file:
            file.write(index)
            flush(file)
        return Shard(
            file=self.path.name,
            split=self.split,
            tokens=self.tokens,
            documents=len(self.starts),
            bytes=sum(self.sizes),
            largest_token=self.largest,
            sha256=self.checksum.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )


class DatasetWriter:
    """Writes a dataset aside, in `NAME.partial`, until `finish` puts it in its place.

    As a context manager it removes what is unfinished when the block fails.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.aside = folder.with_name(folder.name + ".partial")
        self.tokenizer = tokenizer
        self.dtype: TokenType = token_dtype(tokenizer.vocab_size)
        self.open: dict[SplitName, _OpenShard] = {}
        self.closed: list[Shard] = []

    def __enter__(self) -> "DatasetWriter":
        shutil.rmtree(self.aside, ignore_errors=True)
        try:
            self.aside.mkdir(parents=True)
        except OSError as error:
            raise DataError(
                f"{self.folder}: can't be made ({error.strerror}); choose another folder with --out"
            ) from None
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for shard in self.open.values():
            shard.file.close()
        shutil.rmtree(self.aside, ignore_errors=True)

    def add(self, split: SplitName, ids: Sequence[int] | np.ndarray, size: int) -> None:
        """One document: its ids with its marks, and the bytes of its text."""
        shard = self.open.get(split)
        if shard is not None and shard.tokens >= SHARD_TOKENS:
            self.closed.append(self.open.pop(split).close())
            shard = None
        if shard is None:
            number = sum(done.split == split for done in self.closed)
            path = self.aside / f"{split}-{number:05d}.bin"
            shard = self.open[split] = _OpenShard(split, path, self.dtype)
        shard.add(ids, size)

    def tokens(self, split: SplitName) -> int:
        """Tokens of this split so far."""
        return sum(s.tokens for s in (*self.closed, *self.open.values()) if s.split == split)

    def take_back(self, split: SplitName) -> list[tuple[np.ndarray, int]]:
        """Take this split's open shard away again: its documents, as they were added."""
        shard = self.open.pop(split)
        shard.file.close()
        ids = np.fromfile(shard.path, dtype=np.dtype(self.dtype).newbyteorder("<"))
        return list(zip(np.split(ids, shard.starts[1:]), shard.sizes, strict=True))

    def finish(self, sources: dict[str, Any]) -> Manifest:
        """Close the shards, write the manifest, and move everything into place."""
        self.closed += [shard.close() for shard in self.open.values()]
        self.open.clear()
        self.tokenizer.save(self.aside)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tokenizer=self.tokenizer.name,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            dtype=self.dtype,
            beginning_of_document=self.tokenizer.bos,
            end_of_document=self.tokenizer.eos,
            sources=sources,
            shards=sorted(self.closed, key=lambda shard: shard.file),
        )
        with (self.aside / MANIFEST).open("w") as file:
            file.write(manifest.model_dump_json(indent=2) + "\n")
            flush(file)
        old = self.folder.with_name(self.folder.name + ".old")
        if self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
        self.aside.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        return manifest
