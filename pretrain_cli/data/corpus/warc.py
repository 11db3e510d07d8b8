"""WARC files of extracted text, as Common Crawl's `.warc.wet.gz`: each `conversion` record is a
document."""

from collections.abc import Iterator
from typing import IO

from pretrain_cli.data.corpus.compression import Damaged
from pretrain_cli.data.corpus.records import (
    READ_AT_ONCE,
    NotText,
    ParsedRecords,
    Record,
    Source,
    in_parts,
)
from pretrain_cli.errors import DataError

LONGEST_LINE = 2**20
"""Bytes of a header line."""


def wet_texts(source: Source) -> Iterator[ParsedRecords]:
    """Yield the records that hold extracted text. Raises NotText for pages as they were fetched."""
    return in_parts(_texts(source))


def _texts(source: Source) -> Iterator[Record]:
    stream, number = source.stream, 0
    while line := stream.readline(LONGEST_LINE):
        if not line.strip():
            continue
        number += 1
        place = f"{source.path}:{number}"
        if not line.startswith(b"WARC/"):
            raise DataError(f"{place}: no WARC record begins here; mend it")
        fields: dict[bytes, bytes] = {}
        while (line := stream.readline(LONGEST_LINE)).strip():
            name, _, value = line.partition(b":")
            fields[name.strip().lower()] = value.strip()
        if not line:
            raise Damaged(f"it ends in the header of record {number}")
        length = fields.get(b"content-length", b"")
        if not length.isdigit():
            raise DataError(f"{place}: the record has no Content-Length; mend it")
        kind = fields.get(b"warc-type")
        if kind not in (b"conversion", b"warcinfo", b"metadata"):
            raise NotText("WARC of web pages as they were fetched")
        text = _read(stream, int(length), number)
        if kind == b"conversion":
            yield number, text


def _read(stream: IO[bytes], length: int, number: int) -> bytes:
    """Read a record in blocks, because its length may be wrong."""
    blocks: list[bytes] = []
    while length and (block := stream.read(min(length, READ_AT_ONCE))):
        blocks.append(block)
        length -= len(block)
    if length:
        raise Damaged(f"it ends in record {number}")
    return b"".join(blocks)
