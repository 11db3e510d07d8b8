"""Compressed files: how to open each kind, and how each reports damage."""

import bz2
import gzip
import lzma
import sys
import zlib
from pathlib import Path
from typing import IO, Any

from pretrain_cli.errors import DataError


class Damaged(Exception):
    """A file ends early or does not have the format that its name or its first bytes say."""


def signs_of_damage() -> tuple[type[Exception], ...]:
    """Return the exceptions that a damaged compressed file raises. For bz2 this includes an OSError
    without an errno."""
    zstd: Any = sys.modules.get("compression.zstd") or sys.modules.get("backports.zstd")
    signs = (Damaged, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
    return (*signs, zstd.ZstdError) if zstd else signs


def open_gzip(raw: IO[bytes], path: Path) -> Any:
    return gzip.GzipFile(fileobj=raw)


def open_bzip2(raw: IO[bytes], path: Path) -> Any:
    return bz2.BZ2File(raw)


def open_xz(raw: IO[bytes], path: Path) -> Any:
    return lzma.LZMAFile(raw)


def open_zstandard(raw: IO[bytes], path: Path) -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdFile(raw)
    try:
        from backports import zstd
    except ImportError:
        raise DataError(
            f"{path}: reading .zst takes backports.zstd; pip install backports.zstd"
        ) from None
    return zstd.ZstdFile(raw)
