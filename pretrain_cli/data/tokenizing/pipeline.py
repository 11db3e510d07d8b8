"""Pipeline: from the files of a corpus to the shards of a dataset, in one fixed order.

    files ── tasks ── read, hash, cut and encode on all cores ── duplicate? ── shards
                                                              (in order again)

Small files are read by the process that encodes them, larger ones and streams by this one, which
leaves the parsing of records to the others. All keep the order of the corpus, so the position of
the writer is a point to resume from.
"""

import time
from collections.abc import Callable, Iterator
from itertools import islice

from pretrain_cli.data.corpus.documents import Document, Screen
from pretrain_cli.data.corpus.formats import FORMATS
from pretrain_cli.data.corpus.readers import FileReader
from pretrain_cli.data.corpus.records import Part
from pretrain_cli.data.corpus.source_files import Corpus, TextFile
from pretrain_cli.data.parallel import cores
from pretrain_cli.data.tokenizing.blocks import (
    FileEnd,
    FilePart,
    Item,
    RecordsEnd,
    Task,
    WholeFile,
    blocks_of,
)
from pretrain_cli.data.tokenizing.chunking import Chunker
from pretrain_cli.data.tokenizing.encoder import Encoder
from pretrain_cli.data.tokenizing.encoding import TaskEncoder, on_processes
from pretrain_cli.data.tokenizing.progress import Cursor
from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.data.tokenizing.writer import DatasetWriter

TASK_BYTES = 2**20
WHOLE_FILE = 2**20
"""Largest file that is a part of a task. A task's text is held in memory."""
LONG_RECORD = 2**23
"""Bytes of a record that this process parses and cuts, so that the memory of the others is
bounded."""
EXPANSION = 16
"""A compressed file is a part of a task if it is smaller than other files by this factor."""
PACKED = tuple(
    suffix
    for kind, form in FORMATS.items()
    if form.decompress or kind in ("parquet", "arrow")
    for suffix in form.suffixes
)
SMALL = 2**22
"""Bytes of a corpus too small to be worth worker processes."""
SECONDS_BETWEEN_SAVES = 3.0

Progress = Callable[[str, int, int, int], None]
"""Called with (activity, bytes of the files done, bytes of all files, tokens made)."""


def no_progress(activity: str, done: int, total: int, tokens: int) -> None:
    """Show nothing."""


class Pipeline:
    """Feeds one corpus into one dataset."""

    def __init__(
        self,
        request: TokenizeRequest,
        corpus: Corpus,
        dataset: DatasetWriter,
        encoder: Encoder,
        progress: Progress,
    ) -> None:
        self.request, self.corpus, self.dataset = request, corpus, dataset
        self.encoder, self.progress = encoder, progress
        self.cutter = Chunker(dataset.tokenizer)

    def run(self) -> None:
        request, dataset = self.request, self.dataset
        workers = request.workers or cores()
        if is_small(self.corpus):
            workers = 0
        size, has_space = self.corpus.size, False
        saved_at = time.perf_counter()
        work = TaskEncoder(
            dataset.tokenizer,
            self.encoder,
            dataset.shards.dtype,
            request.val_fraction,
            request.reading,
            dataset.staging,
        )
        with on_processes(work, workers) as encode:
            for encoded in encode(self._tasks()):
                dataset.append(encoded)
                raw = encoded.raw_bytes
                if not has_space:  # judged by the first part
                    dataset.check_space(max(0, size - raw) / max(raw, 1))
                    has_space = True
                self.progress("tokenizing", raw, size, dataset.new_tokens)
                if time.perf_counter() - saved_at > SECONDS_BETWEEN_SAVES:
                    dataset.save_progress()
                    saved_at = time.perf_counter()

    def _tasks(self) -> Iterator[Task]:
        """Yield the text to encode, from the position of the writer on."""
        held: list[Item] = []
        size = 0
        for items, their_size, raw_bytes in self._items():
            held += items
            size += their_size
            if size >= TASK_BYTES:
                yield Task(held, raw_bytes)
                held, size = [], 0
        if held:
            yield Task(held, self.corpus.size)

    def _items(self) -> Iterator[tuple[list[Item], int, int]]:
        """Yield (items, bytes of their text, bytes of the corpus up to their end). Between two
        lists of items is a position to resume from."""
        start = self.dataset.blocks.place
        before = sum(file.size for file in self.corpus.files[: start.file])
        for number, file in enumerate(self.corpus.files[start.file :], start=start.file):
            place = start if number == start.file else Cursor(file=number)
            if not (place.document or place.block or place.records) and _is_part(file):
                before += file.size
                yield [WholeFile(file)], file.size, before
                continue
            reader = FileReader(file, self.request.reading, spool=self.dataset.staging)
            for items, size in self._contents(reader, place):
                yield items, size, before + reader.position
            before += file.size
            yield [FileEnd(reader.checksum.hexdigest(), dict(reader.remarks))], 0, before

    def _contents(self, reader: FileReader, place: Cursor) -> Iterator[tuple[list[Item], int]]:
        """Yield (items, bytes of their text) of a large file, from a position in it on."""
        documents, records, block = place.document, place.records, place.block
        for content in reader.contents():
            if isinstance(content, Document):
                if documents:  # the run that is resumed wrote it
                    documents -= 1
                    continue
                for text in islice(blocks_of(content, self.cutter), block, None):
                    yield [text], len(text.text)
                block = 0
            elif content.count <= records:
                records -= content.count
            else:
                part, records = content.after(records), 0
                if part.size <= LONG_RECORD or part.count > 1:
                    yield [FilePart(reader.file.location, part)], part.size
                    continue
                yield from self._long_record(reader.file, part, block)
                block = 0

    def _long_record(
        self, file: TextFile, part: Part, block: int
    ) -> Iterator[tuple[list[Item], int]]:
        """Yield (items, bytes of their text) of a part that is one long record, without its first
        blocks."""
        screen = Screen(file.location, self.request.reading)
        held: list[Item] = []
        size = 0
        for document in screen.documents(part):
            for text in islice(blocks_of(document, self.cutter), block, None):
                if held:
                    yield held, size
                held = [text]
                size = len(text.text)
        yield [*held, RecordsEnd(part.count, dict(screen.remarks))], size


def is_small(corpus: Corpus) -> bool:
    """Return whether a corpus is too small for worker processes."""
    return corpus.size < SMALL and not corpus.has_streams


def _is_part(file: TextFile) -> bool:
    """Return whether a file is read by the process that encodes it."""
    if file.is_stream or file.is_remote:
        return False
    return file.size <= WHOLE_FILE // (EXPANSION if file.location.lower().endswith(PACKED) else 1)
