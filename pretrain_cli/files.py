"""Files that are whole or not there."""

import errno
import hashlib
import math
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any


def is_disk_full(error: OSError | sqlite3.Error) -> bool:
    """Return whether an error means that the disk or quota is full."""
    if isinstance(error, sqlite3.Error):
        return error.sqlite_errorcode == sqlite3.SQLITE_FULL
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def free_space(folder: Path) -> float:
    """Bytes that are free where a folder is or will be; no end of them where the file system
    doesn't say."""
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else math.inf


def append_line(file: Any, line: bytes) -> None:
    """Append to a file that is open without a buffer: all of the line, or on a full disk nothing
    of it."""
    size = os.fstat(file.fileno()).st_size
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


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
