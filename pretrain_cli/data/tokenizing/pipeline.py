"""Pipeline: from the files of a corpus to the shards of a dataset, in one fixed order.

    files ── tasks ── read, hash, cut and encode on all cores ── duplicate? ── shards
                                                              (in order again)

Small files are read by the process that encodes them, larger ones and streams by this one. Blocks
keep the order of the corpus, so the position of the writer is a point to resume from.
"""

import time
from collections.abc import Callable, Iterator
from itertools import islice

from pretrain_cli.data.corpus.formats import FORMATS
from pretrain_cli.data.corpus.readers import FileReader
from pretrain_cli.data.corpus.source_files import Corpus, TextFile
from pretrain_cli.data.parallel import cores
from pretrain_cli.data.tokenizing.blocks import (
    Block,
    FileEnd,
    Task,
    WholeFile,
    blocks_of,
)
from pretrain_cli.data.tokenizing.chunking import Chunker
from pretrain_cli.data.tokenizing.encoder import Encoder
from pretrain_cli.data.tokenizing.encoding import TaskEncoder, on_processes
from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.data.tokenizing.writer import DatasetWriter

TASK_BYTES = 2**20
WHOLE_FILE = 2**20
"""Largest file that is a part of a task. A task's text is held in memory."""
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
        start = self.dataset.blocks.place
        cutter = Chunker(self.dataset.tokenizer)
        items: list[Block | WholeFile | FileEnd] = []
        size = 0
        before = sum(file.size for file in self.corpus.files[: start.file])
        for number, file in enumerate(self.corpus.files[start.file :], start=start.file):
            is_continued = number == start.file and (start.document or start.block)
            if not is_continued and _is_part(file):
                items.append(WholeFile(file))
                before, size = before + file.size, size + file.size
                if size >= TASK_BYTES:
                    yield Task(items, before)
                    items, size = [], 0
                continue
            reader = FileReader(file, self.request.reading, spool=self.dataset.staging)
            documents, block = reader.documents(), 0
            if is_continued:  # the run that is resumed wrote some of it
                documents, block = islice(documents, start.document, None), start.block
            for document in documents:
                for text in islice(blocks_of(document, cutter), block, None):
                    items.append(text)
                    size += len(text.text)
                    if size >= TASK_BYTES:
                        yield Task(items, before + reader.position)
                        items, size = [], 0
                block = 0
            items.append(FileEnd(reader.checksum.hexdigest(), dict(reader.remarks)))
            before += file.size
        if items:
            yield Task(items, before)


def is_small(corpus: Corpus) -> bool:
    """Return whether a corpus is too small for worker processes."""
    return corpus.size < SMALL and not corpus.has_streams


def _is_part(file: TextFile) -> bool:
    """Return whether a file is read by the process that encodes it."""
    if file.is_stream or file.is_remote:
        return False
    return file.size <= WHOLE_FILE // (EXPANSION if file.location.lower().endswith(PACKED) else 1)
