"""Pipeline: from the files of a corpus to the shards of a dataset, in one fixed order.

    files ── documents ── duplicate? validation? ── blocks ── encode on all cores ── shards
                                               │                                │
                                               └ a BlockRecord a block, in order┘

Reading runs ahead of writing by the blocks in the encoder. Each block's BlockRecord holds the
corpus position after it. Together with the extent of the shards, that is a point to resume from.
"""

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from pretrain_cli.data.corpus.readers import Document, FileReader
from pretrain_cli.data.corpus.source_files import Corpus, TextFile
from pretrain_cli.data.shards import Manifest, Shard, SplitName
from pretrain_cli.data.tokenizing.chunking import Chunker
from pretrain_cli.data.tokenizing.duplicates import DuplicateIndex
from pretrain_cli.data.tokenizing.encoding import Block, Encoded, cores, encoders
from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.data.tokenizing.staging import Tally, WriteState
from pretrain_cli.data.tokenizing.writer import DatasetWriter
from pretrain_cli.errors import DataError

BATCH_BYTES = 2**19
BLOCK_CHARACTERS = 2**19
"""Documents of up to twice this length are encoded whole; longer ones in blocks of this length."""
SMALL = 2**22
"""Bytes of a corpus too small to be worth worker processes."""
SECONDS_BETWEEN_SAVES = 3.0

Progress = Callable[[str, int, int, int], None]
"""Called with (activity, bytes of the files done, bytes of all files, tokens made)."""


def no_progress(activity: str, done: int, total: int, tokens: int) -> None:
    """Show nothing."""


class Cursor(NamedTuple):
    """Position in the corpus, with counts of everything before it."""

    file: int = 0
    document: int = 0
    """Documents of the current file that are complete."""
    block: int = 0
    """Complete blocks of the next document."""
    ordinal: int = 0
    """Documents of the corpus that are complete."""
    duplicates: int = 0
    inexact_cuts: int = 0


@dataclass(frozen=True)
class ResumePoint:
    """Position in the corpus and the state of the writer at that position."""

    place: Cursor
    of_file: Tally
    """Text of the current file so far."""
    written: WriteState


class SavedProgress(NamedTuple):
    """Progress that an earlier run saved."""

    here: ResumePoint
    """Point that the earlier run had reached."""
    file_began: ResumePoint
    shards: list[Shard]
    """Finished shards."""


class BlockRecord(NamedTuple):
    """Facts about a block that are known when it is queued."""

    behind: Cursor
    """Position of the text after this block."""
    split: SplitName
    begins: bool
    document_bytes: int
    """Bytes of the document that ends in this block."""
    raw_bytes: int
    """Bytes of the corpus read so far."""


class FileDone(NamedTuple):
    file: TextFile
    behind: Cursor
    sha256: str
    remarks: dict[str, int]


class Pipeline:
    """Feeds one corpus into one writer."""

    def __init__(
        self,
        request: TokenizeRequest,
        corpus: Corpus,
        writer: DatasetWriter,
        progress: Progress,
        *,
        saved: SavedProgress | None,
        appends_to: Manifest | None,
    ) -> None:
        """`saved` is the progress to continue from; `appends_to` the dataset that this one
        extends."""
        self.request, self.corpus, self.writer = request, corpus, writer
        self.progress = progress
        self.appends_to = appends_to
        here = saved.here if saved else ResumePoint(Cursor(), Tally(), writer.written())
        self.place, self.of_file = here.place, replace(here.of_file)
        self.file_began = saved.file_began if saved else here
        self.steps: deque[BlockRecord | FileDone] = deque()
        """Records of the blocks in flight, and of the files that end after them."""
        self.seen = DuplicateIndex(writer.staging, self.place.ordinal, request)
        self.saved_at = time.perf_counter()

    def run(self) -> None:
        workers = self.request.workers or cores()
        if self.corpus.size < SMALL and not self.corpus.has_streams:
            workers = 1
        has_space = False
        with (
            closing(self.seen),
            encoders(self.writer.tokenizer, self.writer.dtype, workers) as encode,
        ):
            for encoded in encode(self._batches()):
                raw = self._take(encoded)
                has_space = has_space or self._check_space(raw)
                self.progress("tokenizing", raw, self.corpus.size, self._made())
                if time.perf_counter() - self.saved_at > SECONDS_BETWEEN_SAVES:
                    self._save_progress()
            self._end_files()
            self.seen.commit()

    # --- reading, ahead of writing ---------------------------------------------------------------

    def _batches(self) -> Iterator[list[Block]]:
        """Yield the text to encode; append a BlockRecord for each of its blocks to `steps`."""
        start = place = self.place
        cutter = Chunker(self.writer.tokenizer)
        batch: list[Block] = []
        size = 0
        before = sum(file.size for file in self.corpus.files[: start.file])
        for number, file in enumerate(self.corpus.files[start.file :], start=start.file):
            reader = FileReader(file, self.request.reading, spool=self.writer.staging)
            done = start.document if number == start.file else 0
            for index, document in enumerate(reader.documents()):
                if index < done:
                    continue
                _, _, block, ordinal, duplicates, inexact = place
                if self.seen.has(document, ordinal):
                    place = Cursor(number, index + 1, 0, ordinal + 1, duplicates + 1, inexact)
                    continue
                split = split_of(document, self.request.val_fraction)
                for nth, (text, exact, ends) in enumerate(_blocks(document, cutter)):
                    if nth < block:  # written by the run that is resumed
                        continue
                    inexact += not exact
                    if ends:
                        place = Cursor(number, index + 1, 0, ordinal + 1, duplicates, inexact)
                    else:
                        place = Cursor(number, index, nth + 1, ordinal, duplicates, inexact)
                    batch.append(Block(text, nth == 0, ends))
                    raw = before + reader.position
                    document_bytes = document.size if ends else 0
                    self.steps.append(BlockRecord(place, split, nth == 0, document_bytes, raw))
                    size += len(text)
                    if size >= BATCH_BYTES:
                        yield batch
                        batch, size = [], 0
            before += file.size
            place = Cursor(number + 1, 0, 0, *place[3:])
            remarks = dict(reader.remarks)
            self.steps.append(FileDone(file, place, reader.checksum.hexdigest(), remarks))
        if batch:
            yield batch

    # --- writing ---------------------------------------------------------------------------------

    def _take(self, encoded: Encoded) -> int:
        """Write a batch, one run of blocks of the same split and file at a time. Return bytes of
        the corpus read."""
        first = last = raw = 0
        starts: list[int] = []
        split: SplitName = "train"
        for count in encoded.counts:
            if isinstance(coming := self.steps[0], FileDone) or coming.split != split:
                self.writer.add(split, encoded.tokens[first:last], starts)
                first, starts = last, []
            step = self._next_step()
            split = step.split
            if step.begins:
                starts.append(last - first)
            last += count
            self.writer.splits[split].bytes += step.document_bytes
            self.of_file.documents += step.begins
            self.of_file.bytes += step.document_bytes
            self.of_file.tokens += count
            self.place, raw = step.behind, step.raw_bytes
        self.writer.add(split, encoded.tokens[first:last], starts)
        return raw

    def _next_step(self) -> BlockRecord:
        """Return the record of the next block, and finish the files that ended before it."""
        self._end_files()
        step = self.steps.popleft()
        assert isinstance(step, BlockRecord)
        return step

    def _end_files(self) -> None:
        while self.steps and isinstance(done := self.steps[0], FileDone):
            self.steps.popleft()
            file = done.file
            self.writer.file_done(
                {
                    "name": file.name,
                    "source": file.source,
                    "size": file.size,
                    "modified": file.modified,
                    "sha256": done.sha256,
                    **asdict(self.of_file),
                    "remarks": done.remarks,
                }
            )
            self.place, self.of_file = done.behind, Tally()
            self.file_began = ResumePoint(self.place, Tally(), self.writer.written())

    def _save_progress(self) -> None:
        """Save the current progress, and the start of the current file in case that file is
        changed."""
        if self.corpus.has_streams:
            return  # a stream can't be read again from its start
        self.seen.commit()
        here = ResumePoint(self.place, self.of_file, self.writer.written())
        file = next(iter(self.corpus.files[here.place.file :]), None)
        self.writer.save_progress(
            {
                "options": self.request.options,
                "appends_to": self.appends_to.fingerprint if self.appends_to else None,
                "file": identity(file) if file else None,
                "here": asdict(here),
                "file_began": asdict(self.file_began),
            }
        )
        self.saved_at = time.perf_counter()

    def _made(self) -> int:
        """Return the tokens made from this corpus."""
        return self.writer.tokens - (self.appends_to.total.tokens if self.appends_to else 0)

    def _check_space(self, raw: int) -> bool:
        """Raise DataError if the dataset will not fit on the disk, judging by its first part."""
        left = max(0, self.corpus.size - raw) / max(raw, 1)
        needed = left * self._made() * self.writer.dtype.itemsize
        free = shutil.disk_usage(self.writer.staging).free
        if needed > free:
            raise DataError(
                f"{self.request.out}: the dataset will take about {needed / 1e9:,.1f} GB more, and "
                f"{free / 1e9:,.1f} GB are free there; free some, or choose another place"
            )
        return True


def _blocks(document: Document, cutter: Chunker) -> Iterator[tuple[bytes, bool, bool]]:
    """Yield (text, whether the cut is exact, whether the document ends) for each block of a
    document."""
    if document.size <= BLOCK_CHARACTERS:
        yield b"".join(document.blocks), True, True
        return
    blocks = cutter.blocks((block.decode() for block in document.blocks), BLOCK_CHARACTERS)
    text, exact = next(blocks)
    for coming in blocks:
        yield text.encode(), exact, False
        text, exact = coming
    yield text.encode(), True, True


def split_of(document: Document, fraction: float) -> SplitName:
    """Return a document's split, by a hash of its text alone."""
    held_out = int.from_bytes(document.digest[:8], "little") < fraction * 2**64
    return "val" if held_out else "train"


def identity(file: TextFile) -> list[Any]:
    return [file.name, file.size, file.modified]
