"""Pipeline: from the files of a corpus to the shards of a dataset, in one fixed order.

    files ── documents ── duplicate? validation? ── blocks ── encode on all cores ── shards
                                               │                                │
                                               └ a BlockRecord a block, in order┘

Reading runs ahead of writing by the blocks in the encoder. Each block's BlockRecord holds the
corpus position after it. Together with the extent of the shards, that is a point to resume from.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from pretrain_cli.data.corpus.readers import Document, FileReader
from pretrain_cli.data.corpus.source_files import Corpus
from pretrain_cli.data.shards import SplitName
from pretrain_cli.data.tokenizing.chunking import Chunker
from pretrain_cli.data.tokenizing.encoding import Block, cores, encoders
from pretrain_cli.data.tokenizing.progress import BlockRecord, Cursor, FileDone
from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.data.tokenizing.writer import DatasetWriter

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


class Pipeline:
    """Feeds one corpus into one dataset."""

    def __init__(
        self, request: TokenizeRequest, corpus: Corpus, dataset: DatasetWriter, progress: Progress
    ) -> None:
        self.request, self.corpus, self.dataset = request, corpus, dataset
        self.progress = progress
        self.records: deque[BlockRecord] = deque()
        """Records of the blocks in flight."""
        self.ended: list[FileDone] = []
        """Files that ended after the last of these blocks."""

    def run(self) -> None:
        dataset = self.dataset
        workers = self.request.workers or cores()
        if self.corpus.size < SMALL and not self.corpus.has_streams:
            workers = 1
        has_space = False
        saved_at = time.perf_counter()
        with encoders(dataset.tokenizer, dataset.shards.dtype, workers) as encode:
            for encoded in encode(self._batches()):
                records = [self.records.popleft() for _ in encoded.counts]
                dataset.append(encoded, records)
                raw = records[-1].raw_bytes
                if not has_space:  # judged by the first part
                    dataset.check_space(max(0, self.corpus.size - raw) / max(raw, 1))
                    has_space = True
                self.progress("tokenizing", raw, self.corpus.size, dataset.new_tokens)
                if time.perf_counter() - saved_at > SECONDS_BETWEEN_SAVES:
                    dataset.save_progress()
                    saved_at = time.perf_counter()
        for done in self.ended:
            dataset.end_file(done)

    def _batches(self) -> Iterator[list[Block]]:
        """Yield the text to encode; append a BlockRecord for each of its blocks to `records`."""
        start = place = self.dataset.place
        cutter = Chunker(self.dataset.tokenizer)
        batch: list[Block] = []
        size = 0
        before = sum(file.size for file in self.corpus.files[: start.file])
        for number, file in enumerate(self.corpus.files[start.file :], start=start.file):
            reader = FileReader(file, self.request.reading, spool=self.dataset.staging)
            done = start.document if number == start.file else 0
            for index, document in islice(enumerate(reader.documents()), done, None):
                _, _, block, ordinal, duplicates, inexact = place
                if self.dataset.seen.has(document, ordinal):
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
                    self.records.append(
                        BlockRecord(place, split, nth == 0, document_bytes, raw, self.ended)
                    )
                    self.ended = []
                    size += len(text)
                    if size >= BATCH_BYTES:
                        yield batch
                        batch, size = [], 0
            before += file.size
            place = Cursor(number + 1, 0, 0, *place[3:])
            remarks = dict(reader.remarks)
            self.ended.append(FileDone(file, place, reader.checksum.hexdigest(), remarks))
        if batch:
            yield batch


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
