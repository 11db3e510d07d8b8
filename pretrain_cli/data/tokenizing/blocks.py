"""Blocks of text on their way to the encoding processes, and the tokens that come back.

file of up to a megabyte    WholeFile ────┐ read, hashed and cut by the process that encodes it
larger file of records      FilePart, … ──┤ parsed by that process
larger text, long record    Block, … ─────┴─> Task ──> encode ──> Encoded
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pretrain_cli.data.corpus.documents import Document
from pretrain_cli.data.corpus.records import Part
from pretrain_cli.data.corpus.source_files import TextFile
from pretrain_cli.data.tokenizing.chunking import Chunker

BLOCK_CHARACTERS = 2**19
"""Documents of up to twice this length are encoded whole; longer ones in blocks of this length."""

BLOCK = np.dtype(
    [
        ("tokens", "<i8"),
        ("bytes", "<i8"),  # of the document that ends here, or 0
        ("digest", "V16"),
        ("begins", "?"),
        ("ends", "?"),
        ("exact", "?"),
        ("held_out", "?"),
    ]
)
"""Facts about an encoded block. All blocks of a document have its digest and its split."""


class Block(NamedTuple):
    """Part of a document's text, ending at a possible cut."""

    text: bytes
    begins: bool
    """True if the document begins here and gets its BOS mark."""
    ends: bool
    exact: bool = True
    """True if the cut after it is known to leave the document's ids unchanged."""
    document_bytes: int = 0
    """Size of the whole document, if it ends here."""
    digest: bytes = bytes(16)
    """Hash of the whole document's text."""


class WholeFile(NamedTuple):
    """A file to read in the process that encodes it."""

    file: TextFile


class FilePart(NamedTuple):
    """Records of a file to parse in the process that encodes them."""

    path: str
    part: Part


class RecordsEnd(NamedTuple):
    """The end of records that came as blocks."""

    records: int
    remarks: dict[str, int]


class FileEnd(NamedTuple):
    """The end of a file."""

    sha256: str
    remarks: dict[str, int]


Item = Block | WholeFile | FilePart | RecordsEnd | FileEnd


class Task(NamedTuple):
    """Work for one process."""

    items: list[Item]
    raw_bytes: int
    """Bytes of the corpus up to the end of these."""


class Encoded(NamedTuple):
    """Tokens of a task."""

    tokens: np.ndarray
    """The tokens of all blocks, concatenated, with document marks."""
    blocks: np.ndarray
    """(n,) BLOCK."""
    files: list[tuple[int, FileEnd]]
    """Files that end, each with the number of blocks before its end."""
    raw_bytes: int
    compared: int
    """Samples whose ids were compared with the tokenizers library's."""
    has_grown: bool
    """True if the process that encoded it has become large."""
    unfinished: RecordsEnd = RecordsEnd(0, {})
    """Records of the file that goes on after this task."""


class Sums:
    """Running sums over the blocks of a task: item n is the sum of the first n blocks."""

    def __init__(self, blocks: np.ndarray, kept: np.ndarray) -> None:
        begins, ends = blocks["begins"], blocks["ends"]
        self.documents = _running(begins & kept)
        self.bytes = _running(blocks["bytes"] * kept)
        self.tokens = _running(blocks["tokens"] * kept)
        self.ends = _running(ends)
        self.duplicates = _running(ends & ~kept)
        self.inexact = _running(~blocks["exact"] & kept)
        behind = np.where(ends, np.arange(1, len(blocks) + 1), 0)
        self.after_end: list[int] = [0, *np.maximum.accumulate(behind).tolist()]
        """The number of blocks up to the last one that ends a document."""


def blocks_of(document: Document, cutter: Chunker) -> Iterator[Block]:
    """Yield the blocks of a document."""
    if document.size <= BLOCK_CHARACTERS:
        text = b"".join(document.blocks)
        yield Block(text, True, True, True, document.size, document.digest)
        return
    blocks = cutter.blocks((block.decode() for block in document.blocks), BLOCK_CHARACTERS)
    text, exact = next(blocks)
    begins = True
    for coming in blocks:
        yield Block(text.encode(), begins, False, exact, 0, document.digest)
        begins, (text, exact) = False, coming
    yield Block(text.encode(), begins, True, True, document.size, document.digest)


def are_held_out(digests: np.ndarray, fraction: float) -> np.ndarray:
    """Return whether documents belong to the validation split, by the hash of their text alone.

    (n,) 16 bytes -> (n,) bool.
    """
    first = np.ascontiguousarray(digests).view("<u8").reshape(-1, 2)[:, 0]
    return first < np.uint64(math.ceil(fraction * 2**64))


def _running(values: np.ndarray) -> list[int]:
    return [0, *np.cumsum(values, dtype=np.int64).tolist()]
