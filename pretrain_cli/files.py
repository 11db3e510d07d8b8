"""Durable file writing: a file is complete or absent, also after a crash or on a full disk."""

import errno
import hashlib
import math
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

LIMITS = {
    errno.EMFILE: "raise the limit on open files with 'ulimit -n 1024'",
    errno.ENFILE: "raise this machine's limit on open files, fs.file-max, or end other programs",
    errno.ENOMEM: "raise the limit on memory with 'ulimit -v unlimited', or free some",
}
"""Limits of the system for opening and mapping files, and what to do."""


def is_disk_full(error: OSError | sqlite3.Error) -> bool:
    """Return whether an error means that the disk or quota is full."""
    if isinstance(error, sqlite3.Error):
        return error.sqlite_errorcode == sqlite3.SQLITE_FULL
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def advice_on_limit(error: OSError) -> str | None:
    """Return what to do about an error that means a limit of the system; None for other errors."""
    if is_disk_full(error):
        return "make room"
    return LIMITS.get(error.errno or 0)


def free_space(folder: Path) -> float:
    """Return the free bytes on the disk of a folder, which need not exist yet; infinity if the file
    system does not report them."""
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else math.inf


def append_line(file: Any, line: bytes) -> None:
    """Append a line to a file opened without a buffer. If a write fails, as on a full disk, restore
    the file's length and raise the OSError."""
    size = os.fstat(file.fileno()).st_size
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically, by renaming a temporary file: old or new contents, never a part."""
    staging = path.with_name(f".{path.name}.partial")
    with staging.open("w", encoding="utf-8") as file:
        file.write(text)
        flush(file)
    staging.replace(path)


def flush(file: Any) -> None:
    """Flush a file's buffers and sync it to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
