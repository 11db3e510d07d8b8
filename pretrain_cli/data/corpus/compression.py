"""Compressed files: how each kind is opened, and how one shows that it is damaged."""

import bz2
import gzip
import lzma
import sys
import zlib
from typing import IO, Any

from pretrain_cli.errors import DataError


class Damaged(Exception):
    """A compressed file that ends too early or is not what its name says."""


def signs_of_damage() -> tuple[type[Exception], ...]:
    """Return the exceptions that a damaged compressed file raises. bz2 also raises an OSError
    without a number."""
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


DECOMPRESS = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstandard,
}
