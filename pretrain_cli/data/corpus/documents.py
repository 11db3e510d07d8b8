"""Documents: texts that are encoded, and the rules by which others are left out."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain_cli.data.corpus.records import Part
from pretrain_cli.errors import DataError

MOST_NULS = 0.1
"""Largest share of NUL bytes in a text; UTF-16 read as UTF-8 has up to a half."""

Errors = Literal["skip", "replace", "fail"]
Kind = Literal["auto", "text", "json", "jsonl", "csv", "tsv", "parquet", "arrow", "wet"]


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading files."""

    text_key: str = "text"
    """Key of the text in JSON, and its column in a table; `a.b` names a nested one."""
    separator: str | None = None
    """Line that separates documents in a plain text file; None means one document a file."""
    errors: Errors | None = None
    """Handling of a document that is not UTF-8, of a null, and of the rest of a damaged file. None
    skips documents and stops at a damaged file."""
    kind: Kind = "auto"
    """Format of all files; auto recognizes it by the first bytes, then by the name."""


@dataclass(frozen=True)
class Document:
    size: int
    """Bytes of the text in UTF-8."""
    digest: bytes
    """Hash of the text, 16 bytes."""
    blocks: Iterable[bytes]
    """UTF-8 text in blocks of whole characters. Must be consumed before the next document is
    read."""


class Screen:
    """Makes documents of the texts of one file, and leaves out what is no text."""

    def __init__(self, path: object, reading: ReadOptions) -> None:
        self.path = path
        """The file's name in messages."""
        self.reading = reading
        self.remarks: Counter[str] = Counter()
        """Number of texts that each remark applies to."""

    def documents(self, part: Part) -> Iterator[Document]:
        """Yield the documents of some records."""
        for number, text in part.texts(self.replaces):
            if text is None:
                self.leave_out("null", f":{number}", "no text; remove it")
            elif document := self.document(text, f":{number}"):
                yield document

    def document(self, data: bytes, where: str) -> Document | None:
        """Return a text as a document; None if it is empty or left out. `where` is its place in the
        file."""
        try:
            if not data.isascii():  # several times as fast
                data.decode()
        except UnicodeDecodeError:
            if not self.replaces(where):
                return None
            data = data.decode(errors="replace").encode()
        if b"\0" in data and self.leaves_out_nuls(data.count(0), len(data), where):
            return None
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return Document(len(data), digest, (data,)) if data else None

    def leaves_out_nuls(self, nuls: int, size: int, where: str) -> bool:
        """Return whether too many bytes of a document are NUL. Counts or refuses the document."""
        if nuls <= MOST_NULS * size:
            return False
        self.leave_out("many NUL bytes", where, "not text, or UTF-16; convert it to UTF-8")
        return True

    def leave_out(self, what: str, where: str, why: str) -> None:
        """Count a text that is left out. Raises DataError if none may be."""
        if self.reading.errors == "fail":
            raise DataError(f"{self.path}{where}: {what}, {why}, or use --errors skip")
        self.remarks[f"{what}, left out"] += 1

    def replaces(self, where: str) -> bool:
        """Return whether to replace bytes that are not UTF-8. Counts or refuses the document."""
        errors = self.reading.errors
        if errors == "fail":
            raise DataError(
                f"{self.path}{where}: not UTF-8; convert it, or use --errors skip or replace"
            )
        self.remarks["not UTF-8, " + ("replaced" if errors == "replace" else "left out")] += 1
        return errors == "replace"
