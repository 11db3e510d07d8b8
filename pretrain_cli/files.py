"""Files that are whole or not there."""

import errno
import hashlib
import os
import sqlite3
from pathlib import Path
from typing import Any


def is_disk_full(error: OSError | sqlite3.Error) -> bool:
    """Whether something could not be written for want of space."""
    if isinstance(error, sqlite3.Error):
        return error.sqlite_errorcode == sqlite3.SQLITE_FULL
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_whole(path: Path, text: str) -> None:
    """Write a file aside, flush and rename it: it is the old one or the new one, never a part."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        flush(file)
    aside.replace(path)


def flush(file: Any) -> None:
    """Bring what was written to a file onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
