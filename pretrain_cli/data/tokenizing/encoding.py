"""Encode tasks on all cores, in their original order.

Uses processes instead of threads: reading, hashing and cutting text in Python would share one core.
Processes are forked where the system allows (a tokenizer of 262,144 words takes 400 MB and a second
to load; a fork shares it). They end with their parent, however it ends.

Each process works in a thread of its own: glibc gives that thread a separate heap, where the
tokenizer's many small allocations are faster than in the heap fragmented by loading it.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain_cli.data.corpus.documents import ReadOptions, Screen
from pretrain_cli.data.corpus.readers import FileReader
from pretrain_cli.data.corpus.records import UntilFailure
from pretrain_cli.data.shared_slots import SharedSlots
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.data.tokenizing.blocks import (
    BLOCK,
    Block,
    Encoded,
    FileEnd,
    FilePart,
    RecordsEnd,
    Task,
    WholeFile,
    are_held_out,
    blocks_of,
)
from pretrain_cli.data.tokenizing.chunking import Chunker
from pretrain_cli.data.tokenizing.encoder import Encoder
from pretrain_cli.errors import DataError

START = "fork" if sys.platform == "linux" else "spawn"
"""Start method of worker processes; a fork isn't safe outside Linux."""
IN_FLIGHT_PER_WORKER = 3
"""Tasks submitted ahead for each worker."""
MEMORY_GROWTH = 2**28
"""Bytes that a worker process may grow before all are replaced by new ones. gigatoken remembers
words without a limit, and gives no memory back."""
BYTES_A_PROCESS = 2**27
"""Bytes of text that a worker process encodes before, where its memory isn't known."""


@dataclass
class TaskEncoder:
    """Reads and encodes tasks with one tokenizer."""

    tokenizer: Tokenizer
    encoder: Encoder
    dtype: np.dtype
    val_fraction: float = 0.0
    reading: ReadOptions = field(default_factory=ReadOptions)
    spool: Path | None = None
    """Folder for copies of long documents."""

    memory_at_start: int | None = None
    encoded_bytes: int = 0

    @cached_property
    def cutter(self) -> Chunker:
        return Chunker(self.tokenizer)

    def __call__(self, task: Task) -> Encoded:
        if self.memory_at_start is None:
            self.memory_at_start = _resident_bytes()
        blocks: list[Block] = []
        files: list[tuple[int, FileEnd]] = []
        records, remarks = 0, Counter[str]()
        for item in task.items:
            match item:
                case Block():
                    blocks.append(item)
                case FilePart():
                    screen = Screen(item.path, self.reading)
                    for document in screen.documents(item.part):
                        blocks += blocks_of(document, self.cutter)
                    records += item.part.count
                    remarks += screen.remarks
                case RecordsEnd():
                    records += item.records
                    remarks += Counter(item.remarks)
                case FileEnd():
                    end = FileEnd(item.sha256, dict(remarks + Counter(item.remarks)))
                    files.append((len(blocks), end))
                    records, remarks = 0, Counter()
                case WholeFile():
                    reader = FileReader(item.file, self.reading, spool=self.spool)
                    for document in reader.documents():
                        blocks += blocks_of(document, self.cutter)
                    end = FileEnd(reader.checksum.hexdigest(), dict(reader.remarks))
                    files.append((len(blocks), end))
        unfinished = RecordsEnd(records, dict(remarks))
        before = self.encoder.compared
        ids, counts = self.encoder.encode(
            [block.text for block in blocks], [not block.begins for block in blocks]
        )
        facts = np.array([(0, b[4], b[5], b[1], b[2], b[3], False) for b in blocks], BLOCK)
        facts["held_out"] = are_held_out(facts["digest"], self.val_fraction)
        tokens, facts["tokens"] = self._marked(ids, counts, facts["begins"], facts["ends"])
        self.encoded_bytes += sum(len(block.text) for block in blocks)
        compared = self.encoder.compared - before
        return Encoded(
            tokens, facts, files, task.raw_bytes, compared, self._has_grown(), unfinished
        )

    def _has_grown(self) -> bool:
        if self.memory_at_start:
            return _resident_bytes() - self.memory_at_start > MEMORY_GROWTH
        return self.encoded_bytes > BYTES_A_PROCESS

    def _marked(
        self, ids: np.ndarray, counts: np.ndarray, begins: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids with the marks of documents, and the number of each block."""
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        begins = begins & (bos is not None)
        totals = counts + begins + ends
        stops = np.cumsum(totals)
        marked = np.empty(totals.sum(), self.dtype)
        is_text = np.ones(len(marked), bool)
        for places, mark in ((stops - totals)[begins], bos), (stops[ends] - 1, eos):
            is_text[places] = False
            marked[places] = mark or 0
        marked[is_text] = ids
        return marked, totals


@contextmanager
def on_processes(encode: TaskEncoder, workers: int) -> Generator[Any]:
    """Yield a function that encodes tasks, keeping their order. Without workers, a thread of this
    process encodes."""
    _ = encode.cutter.lead  # cached here, so that the forked workers share it
    previous = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # garbage collection writes to the objects it visits, so their memory would no longer be shared
    gc.freeze()
    try:
        with _Pools(encode, workers) as pools:
            yield pools.in_order
    finally:
        gc.unfreeze()
        if previous is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = previous


class _UnderWay(NamedTuple):
    """A task that was submitted."""

    pool: int
    future: Future[Encoded | None]
    slot: int | None = None
    """Slot of the task, then of its result."""


class _Pools:
    """A pool of worker processes, replaced by a new one when they have grown large."""

    def __init__(self, encode: TaskEncoder, workers: int) -> None:
        self.encode, self.workers = encode, workers
        self.started: list[Executor] = []
        self.ahead = IN_FLIGHT_PER_WORKER * max(1, workers)
        # processes that are not forked don't share them
        self.slots = SharedSlots(self.ahead + 1 if workers and START == "fork" else 0)
        self.free = list(range(len(self.slots.slots)))

    def __enter__(self) -> "_Pools":
        self._start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for pool in self.started:
            pool.shutdown(cancel_futures=True)
        self.slots.close()

    def _start(self) -> None:
        if not self.workers:
            self.started.append(ThreadPoolExecutor(1))
            return
        context = multiprocessing.get_context(START)
        are_text = self.encode.tokenizer.backend.encode_special_tokens
        self.started.append(
            ProcessPoolExecutor(self.workers, context, _begin, (self.encode, self.slots, are_text))
        )

    def _submit(self, task: Task) -> "_UnderWay":
        pool = len(self.started) - 1
        if not self.workers:
            return _UnderWay(pool, self.started[pool].submit(self.encode, task))
        slot = self.free.pop() if self.free else None
        fits = slot is not None and self.slots.write(slot, task)
        future = self.started[pool].submit(_encode, slot, None if fits else task)
        return _UnderWay(pool, future, slot)

    def _result(self, task: "_UnderWay") -> Encoded:
        encoded = task.future.result()
        if task.slot is None:
            assert encoded is not None
            return encoded
        encoded = encoded or self.slots.read(task.slot)
        self.free.append(task.slot)
        return encoded

    def in_order(self, tasks: Iterable[Task]) -> Iterator[Encoded]:
        under_way: deque[_UnderWay] = deque()

        def next_result() -> Encoded:
            task = under_way.popleft()
            encoded = self._result(task)
            if encoded.has_grown and self.workers and task.pool == len(self.started) - 1:
                self.started[-1].shutdown(wait=False)  # it finishes what it has
                self._start()
            return encoded

        coming = UntilFailure(tasks)  # raised after what comes before it, at any speed
        try:
            for task in coming:
                with warnings.catch_warnings():
                    # warning about forking a process with threads: workers use none of their locks
                    warnings.simplefilter("ignore", DeprecationWarning)
                    under_way.append(self._submit(task))
                if len(under_way) > self.ahead:
                    yield next_result()
            while under_way:
                yield next_result()
            coming.raise_failure()
        except BrokenProcessPool:
            raise DataError(
                "a tokenizing process was ended from outside, perhaps because memory ran out; run "
                "the command again, with fewer --workers"
            ) from None


def _resident_bytes() -> int:
    """Return the resident memory of this process; 0 if the system doesn't tell."""
    with suppress(OSError):
        pages = Path("/proc/self/statm").read_bytes().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0


_encoder: TaskEncoder
_thread: ThreadPoolExecutor
_slots: SharedSlots
"""The tokenizer, its thread, and the memory shared with the parent, in a worker process."""


def _begin(encoder: TaskEncoder, slots: SharedSlots, are_text: bool) -> None:
    """Prepare a worker process. `are_text` treats special tokens in documents as plain text; a
    tokenizer loses this setting when it is pickled."""
    global _encoder, _thread, _slots
    _encoder, _thread, _slots = encoder, ThreadPoolExecutor(1), slots
    encoder.tokenizer.backend.encode_special_tokens = are_text
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the parent process handles them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone, even if killed: it holds the lock on the dataset
    until then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(slot: int | None, task: Task | None) -> Encoded | None:
    """Encode a task, by default the one in a slot. Return None if the result is in the slot."""
    given = task or _slots.read(slot or 0)
    encoded = _thread.submit(_encoder, given).result()
    return None if slot is not None and _slots.write(slot, encoded) else encoded
