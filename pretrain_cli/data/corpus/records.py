"""Records: documents that a file holds as values of a key or a column.

    Source ──reader of the format──> Part, Part, …      little work: lines or columns, not parsed
    Part ──texts──> (number, text), (number, text), …   in any process

The texts are bytes; whether these are UTF-8 is checked by the caller.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Generic, Protocol, TypeVar

READ_AT_ONCE = 2**20
"""Bytes of a file read at a time."""

T = TypeVar("T")
Record = tuple[int, bytes | None]
"""Number and text of a record, None for a null. The number is that of its line where the file has
lines, otherwise its own, from 1."""


class NotText(Exception):
    """A file is of a known format that is not text. The message names the format."""


class Part(Protocol):
    """Consecutive records of a file, about READ_AT_ONCE bytes; a longer record is a part of its
    own. Can be sent to another process."""

    @property
    def size(self) -> int:
        """Bytes of the records."""
        ...

    @property
    def count(self) -> int:
        """Number of records, at least 1. Nulls and blank lines count."""
        ...

    def after(self, count: int) -> "Part":
        """Return the part without its first records."""
        ...

    def texts(self, replaces: Callable[[str], bool]) -> Iterator[Record]:
        """Yield the records that are not blank. `replaces` is called with the place of a record
        that is not UTF-8, such as `:7`, and returns whether to replace the invalid bytes; otherwise
        it is left out. Raises DataError for a record without text."""
        ...


@dataclass(frozen=True)
class ParsedRecords:
    """Part of a file whose records can only be told apart by parsing them."""

    records: list[Record]

    @property
    def size(self) -> int:
        return sum(len(text or b"") for _, text in self.records)

    @property
    def count(self) -> int:
        return len(self.records)

    def after(self, count: int) -> "ParsedRecords":
        return replace(self, records=self.records[count:])

    def texts(self, replaces: Callable[[str], bool]) -> Iterator[Record]:
        yield from self.records


def in_parts(records: Iterator[Record]) -> Iterator[ParsedRecords]:
    """Gather records into parts."""
    for gathered in gather(records, lambda record: len(record[1] or b"")):
        yield ParsedRecords(gathered)


class UntilFailure(Generic[T]):
    """Iterable over items that ends where their iterator raises, so that the items before can be
    handled first."""

    def __init__(self, items: Iterable[T]) -> None:
        self.items = items
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[T]:
        coming = iter(self.items)
        while True:
            try:
                item = next(coming)
            except StopIteration:
                return
            except Exception as error:
                self.failure = error
                return
            yield item

    def raise_failure(self) -> None:
        """Raise the exception that ended the iteration, if one did."""
        if self.failure is not None:
            raise self.failure


def gather(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Gather items into lists of about READ_AT_ONCE bytes; a longer item is a list of its own. An
    exception of the iterator is raised after the items before it."""
    held: list[T] = []
    size, coming = 0, UntilFailure(items)
    for item in coming:
        its_size = size_of(item)
        if held and size + its_size > READ_AT_ONCE:
            yield held
            held, size = [], 0
        held.append(item)
        size += its_size
    if held:
        yield held
    coming.raise_failure()


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened file of records."""

    path: Path
    stream: IO[bytes]
    """The decompressed file, from its first byte."""
    head: bytes
    """Its first bytes."""
    key: str
    """Key or column of the text; `a.b` names the key b of an object under a."""
    can_seek: bool = False
    """True if the file under `path` has the same bytes as `stream`."""
    spool: Path | None = None
    """Folder for a copy of a file that can't seek; None means the system's temporary folder."""

    def open_seekable(self) -> IO[bytes]:
        """Open the file for reading at any position. A stream or compressed file is copied first,
        to the spool folder."""
        if self.can_seek:
            return self.path.open("rb")
        copy = tempfile.TemporaryFile(dir=self.spool)  # noqa: SIM115, the caller closes it
        shutil.copyfileobj(self.stream, copy, READ_AT_ONCE)
        copy.seek(0)
        return copy
