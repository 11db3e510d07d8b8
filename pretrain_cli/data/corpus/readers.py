"""Readers: from the bytes of a file to its documents, in constant memory.

    raw bytes ── decompressed ── records or text ── UTF-8 checked ── Document, in blocks

A document is a file, a part of a file between separator lines, or a record: a line of JSON, a row
of a table. `formats.py` says which. Its text is kept as it is, except for a byte order mark at the
beginning of a file: newlines are not translated and nothing is stripped. A document longer than a
few megabytes is read twice, because its last byte decides whether it is UTF-8, held out or a
duplicate: a plain file by seeking back, any other from a temporary copy. Only a record is held in
memory completely, whatever its length.
"""

import codecs
import hashlib
import io
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pretrain_cli.data.corpus.compression import signs_of_damage
from pretrain_cli.data.corpus.documents import Document, ReadOptions, Screen
from pretrain_cli.data.corpus.formats import FORMATS, HEAD, TEXT, recognize, strip_compression
from pretrain_cli.data.corpus.hub import HubFile
from pretrain_cli.data.corpus.records import NotText, Part, Source
from pretrain_cli.data.corpus.source_files import STANDARD_INPUT, TextFile
from pretrain_cli.errors import DataError
from pretrain_cli.files import is_disk_full

READ_BYTES = 2**20
"""Bytes read at a time."""
MAX_IN_MEMORY = 2**23
"""Bytes of a document kept in memory; a longer document is read twice."""
BYTE_ORDER_MARK = codecs.BOM_UTF8
DAMAGED = "damaged; documents that end before that are kept"


class FileReader:
    """Reads the documents of one file; afterwards holds counts and remarks."""

    def __init__(self, file: TextFile, reading: ReadOptions, spool: Path | None = None) -> None:
        """`spool` is the folder for copies of long documents; None means the system's temporary
        folder."""
        self.file = file
        self.reading = reading
        self.spool = spool
        self.checksum = hashlib.sha256()
        self.position = 0
        """Raw bytes read so far."""
        self.screen = Screen(file.location, reading)
        self.before = "0 documents"
        """Count of all that was read."""

    @property
    def remarks(self) -> Counter[str]:
        return self.screen.remarks

    def documents(self) -> Iterator[Document]:
        """Yield every document that is not empty, in order. Raises DataError for unreadable
        content."""
        for content in self.contents():
            if isinstance(content, Document):
                yield content
            else:
                yield from self.screen.documents(content)

    def contents(self) -> Iterator[Document | Part]:
        """Yield every document that is not empty; of a file of records, parts that are not parsed
        yet."""
        count = 0
        try:
            with self._open_raw() as raw:
                try:
                    for content in self._read(raw):
                        yield content
                        is_document = isinstance(content, Document)
                        count += 1 if is_document else content.count
                        self.before = f"{count:,} {'documents' if is_document else 'records'}"
                except NotText as error:
                    self.screen.leave_out(str(error), "", "which is not read; convert it to text")
                while raw.read(READ_BYTES):  # the checksum covers trailing bytes too
                    pass
        except signs_of_damage() as error:
            self._damaged(str(error))
        except OSError as error:
            if is_disk_full(error):  # filled by the copy of a long document
                raise
            if error.errno is not None:
                raise DataError(f"{self.file.location}: can't be read ({error.strerror})") from None
            self._damaged(str(error))  # bz2 raises an OSError without errno

    def _read(self, raw: IO[bytes]) -> Iterator[Document | Part]:
        location, reading = self.file.location, self.reading
        name = os.path.basename(location).lower()
        can_seek = not (self.file.is_stream or self.file.is_remote)
        head, stream = _peeked(raw)
        kind = recognize(name, head, key=reading.text_key, asked=reading.kind)
        while decompress := FORMATS[kind].decompress:
            name, can_seek = strip_compression(name), False
            head, stream = _peeked(decompress(stream, Path(location)))
            kind = recognize(name, head, key=reading.text_key, asked=reading.kind)
        if records := FORMATS[kind].records:
            source = Source(
                path=Path(location),
                stream=stream,
                head=head,
                key=reading.text_key,
                can_seek=can_seek,
                spool=self.spool,
            )
            yield from records(source)
        elif kind == TEXT:
            mark = stream.read(len(BYTE_ORDER_MARK)) if head.startswith(BYTE_ORDER_MARK) else b""
            yield from self._plain(stream, len(mark), can_seek=can_seek)
        else:
            raise NotText(kind)

    def _damaged(self, why: str) -> None:
        if self.reading.errors in (None, "fail"):
            raise DataError(
                f"{self.file.location}: damaged ({why}) after {self.before}; get it again, "
                "or keep what comes before that with --errors skip"
            ) from None
        self.remarks[DAMAGED] += 1

    def _open_raw(self) -> io.BufferedReader | io.BytesIO:
        if 0 < self.file.size < READ_BYTES and not self.file.is_remote:
            with open(self.file.location, "rb", buffering=0) as small:
                data = small.read(READ_BYTES)
            if len(data) < READ_BYTES:  # it has not grown
                self.position = len(data)
                self.checksum.update(data)
                return io.BytesIO(data)
        file: Any
        if self.file.is_remote:
            file = HubFile(self.file)
        elif self.file.name == STANDARD_INPUT:
            file = sys.stdin.buffer
        else:
            file = open(self.file.location, "rb", buffering=0)  # noqa: SIM115, closed by the reader
        return io.BufferedReader(_Observed(file, self), READ_BYTES)

    # --- plain text ------------------------------------------------------------------------------

    def _plain(self, stream: IO[bytes], begins_at: int, *, can_seek: bool) -> Iterator[Document]:
        held: list[bytes] = []
        size, start = 0, begins_at
        pending: _LongDocument | None = None
        try:
            for segment in _segments(stream, self.reading.separator, begins_at):
                if isinstance(segment, int):  # end of a document, start of the next
                    document = (
                        pending.finish()
                        if pending
                        else self.screen.document(b"".join(held), f" from byte {start:,} on")
                    )
                    if document:
                        yield document
                    if pending:
                        pending.close()
                    held, size, start, pending = [], 0, segment, None
                elif pending:
                    pending.add(segment)
                else:
                    held.append(segment)
                    size += len(segment)
                    if size > MAX_IN_MEMORY:
                        pending = _LongDocument(self, start, can_seek=can_seek)
                        for part in held:
                            pending.add(part)
                        held = []
        finally:  # also if reading stops inside a long document
            if pending:
                pending.close()


class _LongDocument:
    """A document too long for memory: read to its end once, then read again from its start."""

    def __init__(self, reader: FileReader, start: int, *, can_seek: bool) -> None:
        self.reader = reader
        self.start = start
        self.length = self.size = self.nuls = 0
        self.errors = "replace" if reader.reading.errors == "replace" else "strict"
        self.decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self.cleaner = codecs.getincrementaldecoder("utf-8")("replace")
        self.digest = hashlib.blake2b(digest_size=16)
        self.broken = False
        self.copy = None
        if not can_seek:
            self.copy = tempfile.TemporaryFile(dir=reader.spool)  # noqa: SIM115, closed by close

    def add(self, data: bytes, *, last: bool = False) -> None:
        if not self.broken:
            try:
                self.decoder.decode(data, last)
            except UnicodeDecodeError:
                self.broken = True
                self.reader.screen.replaces(f" from byte {self.start:,} on")
        clean = self.cleaner.decode(data, last).encode()
        self.length += len(data)
        self.nuls += data.count(0)
        self.size += len(clean)
        self.digest.update(clean)
        if self.copy:
            self.copy.write(data)

    def finish(self) -> Document | None:
        self.add(b"", last=True)
        if self.broken and self.errors == "strict":
            return None
        where = f" from byte {self.start:,} on"
        if self.reader.screen.leaves_out_nuls(self.nuls, self.length, where):
            return None
        return Document(self.size, self.digest.digest(), self._blocks())

    def _blocks(self) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if self.copy:
            self.copy.seek(0)
        with self.copy or self.reader.file.path.open("rb") as file:
            if not self.copy:
                file.seek(self.start)
            left = self.length
            while left and (data := file.read(min(READ_BYTES, left))):
                left -= len(data)
                yield decoder.decode(data, not left).encode()

    def close(self) -> None:
        if self.copy:
            self.copy.close()


class _Observed(io.RawIOBase):
    """A raw file that counts and hashes every byte its reader consumes."""

    def __init__(self, file: Any, reader: FileReader) -> None:
        self.raw = file
        self.reader = reader
        self.name = str(reader.file.path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.raw.readinto(buffer)
        if count:
            self.reader.position += count
            self.reader.checksum.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        if not self.closed and self.raw is not getattr(sys.stdin, "buffer", None):
            self.raw.close()
        super().close()


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes were read already. A failure to read them is raised after them."""

    def __init__(self, head: bytes, stream: IO[bytes], failure: Exception | None) -> None:
        self.head, self.stream, self.failure = head, stream, failure

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.head:
            if self.failure:
                raise self.failure
            return self.stream.readinto1(buffer)  # pyright: ignore[reportAttributeAccessIssue]
        block, self.head = self.head[: len(buffer)], self.head[len(buffer) :]
        buffer[: len(block)] = block
        return len(block)


def _peeked(stream: Any) -> tuple[bytes, io.BufferedReader | io.BytesIO]:
    """Return the first bytes of a stream, and the stream from its beginning."""
    if isinstance(stream, io.BytesIO):
        return bytes(stream.getbuffer()[:HEAD]), stream
    head, failure = b"", None
    try:
        while len(head) < HEAD and (block := stream.read1(HEAD - len(head))):
            head += block
    except (*signs_of_damage(), OSError) as error:
        failure = error
    return head, io.BufferedReader(_Rejoined(head, stream, failure), READ_BYTES)


def _segments(stream: IO[bytes], separator: str | None, place: int) -> Iterator[bytes | int]:
    """Yield the bytes of documents in order; after each document, the position of the next. `place`
    is the position of the stream."""
    if separator is None:
        while block := stream.read(READ_BYTES):
            place += len(block)
            yield block
        yield place
        return
    line = re.compile(rb"^" + re.escape(separator.encode()) + rb"\r?(?:\n|\Z)", re.MULTILINE)
    rest = b""
    at_line_start = True
    while True:
        block = stream.read(READ_BYTES)
        text = rest + block
        # take whole lines, except at the end of the file or in a line longer than a block
        end = len(text) if not block else text.rfind(b"\n") + 1
        if not end and len(text) > READ_BYTES + len(separator):
            end = len(text)
        lines, rest = text[:end], text[end:]
        done = 0
        for match in line.finditer(lines):
            is_whole = match.group().endswith(b"\n") or not block
            if (match.start() == 0 and not at_line_start) or not is_whole:
                continue
            yield lines[done : match.start()]
            done = match.end()
            yield place + done
        if lines[done:]:
            yield lines[done:]
        if lines:
            at_line_start = lines.endswith(b"\n")
        place += len(lines)
        if not block:
            yield place
            return
