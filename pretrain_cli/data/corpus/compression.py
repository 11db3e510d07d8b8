"""Compressed files: how to open each kind, and how each reports damage."""

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import IO, Any

from pretrain_cli.errors import DataError


class Damaged(Exception):
    """A compressed file ends early or does not have the format its name says."""


def signs_of_damage() -> tuple[type[Exception], ...]:
    """Return the exceptions that a damaged compressed file raises. For bz2 this includes an OSError
    without an errno."""
    zstd: Any = sys.modules.get("compression.zstd") or sys.modules.get("backports.zstd")
    signs = (Damaged, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
    return (*signs, zstd.ZstdError) if zstd else signs


def _zstandard(raw: IO[bytes]) -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdFile(raw)
    try:
        from backports import zstd
    except ImportError:
        raise DataError(
            f"{raw.name}: reading .zst takes backports.zstd; pip install backports.zstd"
        ) from None
    return zstd.ZstdFile(raw)


def _gzip(raw: IO[bytes]) -> Any:
    return gzip.GzipFile(fileobj=raw)


DECOMPRESS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": _gzip,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstandard,
}
