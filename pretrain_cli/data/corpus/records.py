"""Records: documents that a file holds as values of a key or a column.

A format's reader takes a `Source` and yields `Records`: the number of each record, from 1, and its
text as bytes, or None for a null. Whether the bytes are UTF-8 is checked by its caller.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

READ_AT_ONCE = 2**20
"""Bytes of a file read at a time."""

Records = Iterator[tuple[int, bytes | None]]
"""Number and text of each record. The number is that of its line where the file has lines."""


class NotText(Exception):
    """A file is of a known format that is not text. The message names the format."""


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
    replaces: Callable[[str], bool]
    """Called with the place of text that is not UTF-8; returns whether to replace the invalid
    bytes, otherwise the text is left out."""
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
