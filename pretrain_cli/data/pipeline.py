"""From the files of a corpus to the shards of a dataset, in one order.

    files ── documents ── seen before? held out? ── blocks ── encode on all cores ── shards
                                            │                                   │
                                            └── a Step for each block, in order ┘

Reading runs ahead of writing by what is being encoded. Each block's Step says where in the corpus
the text behind it begins; with how far the shards go, that is a place to go on from.
"""

import os
import shutil
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pretrain_cli.data.corpus import Corpus, TextFile
from pretrain_cli.data.cutting import Cutter
from pretrain_cli.data.encoding import Block, encoders
from pretrain_cli.data.request import TokenizeRequest
from pretrain_cli.data.shards import Amount, Manifest, SplitName
from pretrain_cli.data.text import Document, FileReader
from pretrain_cli.data.tokenizer import Tokenizer
from pretrain_cli.data.writer import DatasetWriter, Written, dtype_for
from pretrain_cli.errors import DataError

BATCH_BYTES = 2**19
BLOCK_CHARACTERS = 2**19
"""A document up to twice as long goes to a worker whole; a longer one in blocks of so much."""
SMALL = 2**22
"""Bytes of a corpus that isn't worth another process."""
SECONDS_BETWEEN_NOTES = 3.0
SEEN = "seen.sqlite"
"""Digests of the documents of a dataset without duplicates."""

Progress = Callable[[str, int, int, int], None]
"""(what is being done, bytes of the files done, bytes in all, tokens made)."""


@dataclass
class Start:
    """Where in the order of text to begin, and what had come of what lies before."""

    file: int = 0
    document: int = 0
    """Documents of that file that are done with."""
    block: int = 0
    """Blocks of the next that are."""
    ordinal: int = 0
    """Documents of the corpus that are done with."""
    duplicates: int = 0
    inexact_cuts: int = 0
    of_file: Amount = field(default_factory=Amount)
    """What the file has given so far."""
    written: Written | None = None


@dataclass(frozen=True)
class Step:
    """What is known of a block when it is handed on: where the next begins, and what is due."""

    start: Start
    split: SplitName
    begins: bool
    document_bytes: int
    """Of the document that ends here."""
    raw_bytes: int
    """Of the corpus, read so far."""


@dataclass(frozen=True)
class FileDone:
    file: TextFile
    start: Start
    sha256: str
    remarks: dict[str, int]


@dataclass
class Pipeline:
    """One corpus on its way into one writer."""

    request: TokenizeRequest
    corpus: Corpus
    tokenizer: Tokenizer
    writer: DatasetWriter
    progress: Progress
    start: Start
    there: Manifest | None
    """The dataset that this one is appended to."""
    steps: deque[Step | FileDone] = field(default_factory=deque)
    """Of the blocks under way, and of the files that end behind them."""

    def run(self) -> None:
        workers = self.request.workers or len(os.sched_getaffinity(0))
        if self.corpus.size < SMALL and not self.corpus.has_streams:
            workers = 1
        self.seen = Seen(self.writer.aside / SEEN, self.start.ordinal, self.request)
        self.noted = time.perf_counter()
        self.file_start = self.start  # as it was when the file at hand began
        self.file_start.written = self.file_start.written or self.writer.written()
        self.done = self.start
        self.of_file = self.start.of_file
        checked, raw = False, 0
        with encoders(self.tokenizer, dtype_for(self.tokenizer), workers) as encode:
            for encoded in encode(self._batches()):
                position = 0
                for count in encoded.counts:
                    step = self._next_step()
                    self._take(step, encoded.tokens[position : position + count])
                    position += count
                    raw = step.raw_bytes
                checked = checked or self._check_space(raw)
                self.progress("tokenizing", raw, self.corpus.size, self._made())
                if time.perf_counter() - self.noted > SECONDS_BETWEEN_NOTES:
                    self._note()
            while self.steps:
                done = self.steps.popleft()
                assert isinstance(done, FileDone)
                self._end_of_file(done)
        self.seen.close()

    # --- reading, ahead of what is written -------------------------------------------------------

    def _batches(self) -> Iterator[list[Block]]:
        """The text that is to be encoded, with a step for each block of it left in `steps`."""
        start = self.start
        cutter = Cutter(self.tokenizer)
        batch: list[Block] = []
        size = 0
        before = sum(file.size for file in self.corpus.files[: start.file])
        at = replace(start)
        for number, file in enumerate(self.corpus.files[start.file :], start=start.file):
            reader = FileReader(file, self.request.reading, spool=self.writer.aside)
            for index, document in enumerate(reader.documents()):
                is_first = number == start.file and index == start.document
                if number == start.file and index < start.document:
                    continue
                if self.seen.has(document, at.ordinal):
                    at = replace(
                        at, document=index + 1, ordinal=at.ordinal + 1, duplicates=at.duplicates + 1
                    )
                    continue
                split = split_of(document, self.request.val_fraction)
                blocks = _blocks(document, cutter)
                for nth, (text, begins, ends, exact) in enumerate(blocks):
                    if is_first and nth < start.block:
                        continue
                    at = replace(
                        at,
                        file=number,
                        document=index + ends,
                        block=0 if ends else nth + 1,
                        ordinal=at.ordinal + ends,
                        inexact_cuts=at.inexact_cuts + (not exact),
                    )
                    batch.append(Block(text, begins, ends))
                    size += len(text)
                    self.steps.append(
                        Step(
                            at,
                            split,
                            begins,
                            document.size if ends else 0,
                            before + reader.position,
                        )
                    )
                    if size >= BATCH_BYTES:
                        yield batch
                        batch, size = [], 0
            before += file.size
            at = replace(at, file=number + 1, document=0, block=0)
            done = FileDone(file, at, reader.checksum.hexdigest(), dict(reader.remarks))
            self.steps.append(done)
        if batch:
            yield batch

    # --- writing ---------------------------------------------------------------------------------

    def _next_step(self) -> Step:
        """The step of the next block; files that ended before it are finished."""
        while not isinstance(step := self.steps.popleft(), Step):
            self._end_of_file(step)
        return step

    def _take(self, step: Step, tokens: Any) -> None:
        self.writer.add(step.split, tokens, [0] if step.begins else [])
        if step.document_bytes:
            self.writer.count(step.split, bytes=step.document_bytes)
        self.of_file += Amount(
            documents=int(step.begins), bytes=step.document_bytes, tokens=len(tokens)
        )
        self.done = step.start

    def _end_of_file(self, done: FileDone) -> None:
        file = done.file
        row = {
            "name": file.name,
            "source": file.source,
            "size": file.size,
            "modified": file.modified,
            "sha256": done.sha256,
            **self.of_file.model_dump(exclude={"files"}),
            "remarks": done.remarks,
        }
        self.writer.file_done(row)
        self.of_file = Amount()
        self.done = done.start
        self.file_start = replace(done.start, of_file=Amount(), written=self.writer.written())

    def _note(self) -> None:
        """Note how far everything is, and where the file at hand began, in case it is changed."""
        if self.corpus.has_streams:
            return  # they can't be read again from the start
        self.seen.commit()
        here = replace(self.done, of_file=self.of_file, written=self.writer.written())
        current = self.corpus.files[here.file] if here.file < len(self.corpus.files) else None
        self.writer.note(
            {
                "options": self.request.options,
                "tokenizer_fingerprint": self.tokenizer.fingerprint,
                "appends_to": self.there.fingerprint if self.there else None,
                "file": identity(current) if current else None,
                "here": as_dict(here),
                "file_start": as_dict(self.file_start),
            }
        )
        self.noted = time.perf_counter()

    def _made(self) -> int:
        """Tokens that this corpus has come to."""
        written = self.writer.tokens("train") + self.writer.tokens("val")
        return written - (self.there.total.tokens if self.there else 0)

    def _check_space(self, raw: int) -> bool:
        """Refuse a corpus whose dataset the disk can't hold, by what its first part came to."""
        left = max(0, self.corpus.size - raw) / max(raw, 1)
        needed = left * self._made() * self.writer.dtype.itemsize
        free = shutil.disk_usage(self.writer.aside).free
        if needed > free:
            raise DataError(
                f"{self.request.out}: the dataset will take about {needed / 1e9:,.1f} GB more, and "
                f"{free / 1e9:,.1f} GB are free there; free some, or choose another place"
            )
        return True


def _blocks(document: Document, cutter: Cutter) -> Iterator[tuple[bytes, bool, bool, bool]]:
    """(text, begins, ends, exactly cut) of each block of a document."""
    if document.size <= BLOCK_CHARACTERS:
        yield b"".join(document.blocks), True, True, True
        return
    texts = (block.decode() for block in document.blocks)
    held: tuple[str, bool] | None = None
    begins = True
    for coming in cutter.blocks(texts, BLOCK_CHARACTERS):
        if held is not None:
            yield held[0].encode(), begins, False, held[1]
            begins = False
        held = coming
    if held is not None:
        yield held[0].encode(), begins, True, True


def split_of(document: Document, fraction: float) -> SplitName:
    held_out = int.from_bytes(document.digest[:8], "little") < fraction * 2**64
    return "val" if held_out else "train"


class Seen:
    """Which documents there were, on disk, so that memory does not grow with their number."""

    def __init__(self, path: Path, ordinal: int, request: TokenizeRequest) -> None:
        self.database: sqlite3.Connection | None = None
        if not request.dedup:
            return
        before = request.out / SEEN
        if request.append and not path.exists() and before.exists():
            shutil.copyfile(before, path)
            shift = sqlite3.connect(path)
            shift.execute("UPDATE seen SET ordinal = -1")
            shift.commit()
            shift.close()
        self.database = sqlite3.connect(path)
        self.database.execute("PRAGMA synchronous = OFF")
        self.database.execute(
            "CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY, ordinal INTEGER)"
            " WITHOUT ROWID"
        )
        self.database.execute("DELETE FROM seen WHERE ordinal >= ?", (ordinal,))

    def has(self, document: Document, ordinal: int) -> bool:
        """Whether a document with this text came before; from now on it has."""
        if self.database is None:
            return False
        added = self.database.execute(
            "INSERT OR IGNORE INTO seen VALUES (?, ?)", (document.digest, ordinal)
        )
        return added.rowcount == 0

    def commit(self) -> None:
        if self.database is not None:
            self.database.commit()

    def close(self) -> None:
        if self.database is not None:
            self.database.commit()
            self.database.close()


def identity(file: TextFile) -> list[Any]:
    return [file.name, file.size, file.modified]


def as_dict(start: Start) -> dict[str, Any]:
    parts = dict(start.__dict__)
    return parts | {
        "of_file": start.of_file.model_dump(),
        "written": start.written.model_dump() if start.written else None,
    }
