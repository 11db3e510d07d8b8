"""Formats of files, in one table: how each is recognized, and how it is read.

    first bytes ──┬── compressed: decompress, and look at the first bytes again
                  ├── records (Parquet, JSON, CSV, …): a document each
                  ├── not text (PDF, image, database, …): left out by name
                  └── none of these: plain text

What the first bytes say counts before the name. JSON and CSV have no first bytes of their own, so
their names decide.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pretrain_cli.data.corpus.columns import arrow_rows, parquet_rows
from pretrain_cli.data.corpus.compression import open_bzip2, open_gzip, open_xz, open_zstandard
from pretrain_cli.data.corpus.delimited import csv_rows, tsv_rows
from pretrain_cli.data.corpus.json_records import has_json_text, json_lines, json_rows
from pretrain_cli.data.corpus.records import Part, Source
from pretrain_cli.data.corpus.warc import wet_texts

HEAD = 2**16
"""First bytes of a file that its format is recognized by."""
TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of files. One that is neither decompressed nor read as records is left out by
    name."""

    suffixes: tuple[str, ...] = ()
    begins: tuple[bytes, ...] = ()
    """First bytes; a file has one of these at position `at`."""
    at: int = 0
    fits: Callable[[bytes, str], bool] | None = None
    """Called with the first bytes and the key of the text, for a file that nothing else tells."""
    decompress: Callable[[IO[bytes], Path], Any] | None = None
    records: Callable[[Source], Iterator[Part]] | None = None


FORMATS = {
    "gzip": Format(suffixes=(".gz", ".gzip"), begins=(b"\x1f\x8b\x08",), decompress=open_gzip),
    "bzip2": Format(
        suffixes=(".bz2",),
        begins=tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)),
        decompress=open_bzip2,
    ),
    "xz": Format(suffixes=(".xz",), begins=(b"\xfd7zXZ\0",), decompress=open_xz),
    "zstd": Format(
        suffixes=(".zst", ".zstd"), begins=(b"\x28\xb5\x2f\xfd",), decompress=open_zstandard
    ),
    "parquet": Format(suffixes=(".parquet",), begins=(b"PAR1\x15",), records=parquet_rows),
    "arrow": Format(
        suffixes=(".arrow", ".arrows", ".feather", ".ipc"),
        begins=(b"ARROW1\0\0", b"\xff\xff\xff\xff"),
        records=arrow_rows,
    ),
    "wet": Format(
        suffixes=(".wet", ".warc"), begins=(b"WARC/1.0\r\n", b"WARC/1.1\r\n"), records=wet_texts
    ),
    "json": Format(suffixes=(".json",), fits=has_json_text, records=json_rows),
    "jsonl": Format(suffixes=(".jsonl", ".ndjson", ".jl"), records=json_lines),
    "csv": Format(suffixes=(".csv",), records=csv_rows),
    "tsv": Format(suffixes=(".tsv", ".tab"), records=tsv_rows),
    TEXT: Format(),
    "UTF-32 text": Format(begins=(b"\xff\xfe\0\0", b"\0\0\xfe\xff")),
    "UTF-16 text": Format(begins=(b"\xff\xfe", b"\xfe\xff")),
    "PDF document": Format(begins=(b"%PDF-",)),
    "RTF document": Format(begins=(b"{\\rtf1",)),
    "Microsoft Office document": Format(begins=(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",)),
    "zip archive or document": Format(begins=(b"PK\3\4", b"PK\5\6", b"PK\7\x08")),
    "tar archive": Format(begins=(b"ustar\0", b"ustar  \0"), at=257),
    "7z archive": Format(begins=(b"7z\xbc\xaf\x27\x1c",)),
    "rar archive": Format(begins=(b"Rar!\x1a\7",)),
    "LZ4 file": Format(begins=(b"\x04\x22\x4d\x18",)),
    "Snappy file": Format(begins=(b"\xff\6\0\0sNaPpY",)),
    "compress (.Z) file": Format(begins=(b"\x1f\x9d",)),
    "PNG image": Format(begins=(b"\x89PNG",)),
    "JPEG image": Format(begins=(b"\xff\xd8\xff",)),
    "GIF image": Format(begins=(b"GIF87a", b"GIF89a")),
    "WebP image": Format(begins=(b"WEBPVP8",), at=8),
    "TIFF image": Format(begins=(b"II*\0", b"MM\0*")),
    "MP4 video": Format(begins=(b"ftyp",), at=4),
    "Ogg audio": Format(begins=(b"OggS\0",)),
    "FLAC audio": Format(begins=(b"fLaC\0",)),
    "MP3 audio": Format(begins=(b"ID3\2", b"ID3\3", b"ID3\4")),
    "SQLite database": Format(begins=(b"SQLite format 3\0",)),
    "NumPy array": Format(begins=(b"\x93NUMPY",)),
    "HDF5 file": Format(begins=(b"\x89HDF\r\n\x1a\n",)),
    "Avro file": Format(begins=(b"Obj\1",)),
    "ORC file": Format(suffixes=(".orc",)),
    "Feather version 1 table": Format(begins=(b"FEA1\0",)),
    "Python pickle": Format(begins=tuple(b"\x80%c" % protocol for protocol in range(2, 6))),
    "safetensors file": Format(begins=(b'\0\0\0\0\0{"',), at=3),
    "GGUF model": Format(begins=tuple(b"GGUF%c\0\0\0" % version for version in range(1, 4))),
    "program": Format(begins=(b"\x7fELF", b"MZ\x90\0", b"\xcf\xfa\xed\xfe")),
}
"""Rows are tried from the first to the last. `--input` takes the names of those with records, and
`text`."""


def recognize(name: str, head: bytes, *, key: str, asked: str = "auto") -> str:
    """Return the name of a file's row in FORMATS, by its first bytes, then by its lower-case name.
    `asked` is the format of its records or text, if that is known."""
    begins, suffixes = _all_signs(tuple(FORMATS))
    told = named = None
    if any(head.startswith(signs, at) for at, signs in begins):
        told = next(kind for kind, form in FORMATS.items() if head.startswith(form.begins, form.at))
    if name.endswith(suffixes):
        named = next(kind for kind, form in FORMATS.items() if name.endswith(form.suffixes))
    for kind in (told, named):
        if kind and (FORMATS[kind].decompress or asked == "auto" or not is_read(kind)):
            return kind
    if asked != "auto":
        return asked
    fitting = (kind for kind, form in FORMATS.items() if form.fits and form.fits(head, key))
    return next(fitting, TEXT)


@functools.cache
def _all_signs(
    kinds: tuple[str, ...],
) -> tuple[list[tuple[int, tuple[bytes, ...]]], tuple[str, ...]]:
    """Return (first bytes of all formats by their position, all suffixes): most files have none of
    these, and are told at once."""
    begins: dict[int, tuple[bytes, ...]] = {}
    suffixes: tuple[str, ...] = ()
    for kind in kinds:
        form = FORMATS[kind]
        begins[form.at] = begins.get(form.at, ()) + form.begins
        suffixes += form.suffixes
    return list(begins.items()), suffixes


def is_read(kind: str) -> bool:
    """Return whether files of this format are read, as records or as text."""
    return kind == TEXT or FORMATS[kind].records is not None


def strip_compression(name: str) -> str:
    """Return a file name without the suffix of a compressed file, if it has one."""
    suffixes = (end for form in FORMATS.values() if form.decompress for end in form.suffixes)
    return next((name.removesuffix(end) for end in suffixes if name.endswith(end)), name)
