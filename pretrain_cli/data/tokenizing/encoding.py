"""Encode blocks of text on all cores, in their original order.

Uses processes instead of the library's threads: threads share a lock on the cache of words, and the
ids leave the library as Python integers, a step that one interpreter does not speed up with more
cores. Processes are forked where the system allows (a tokenizer of 262,144 words takes 400 MB and a
second to load; a fork shares it). They end with their parent, however it ends.

Each process encodes in a thread of its own: glibc gives that thread a separate heap, where the
tokenizer's many small allocations are faster than in the heap fragmented by loading it.
"""

import array
import gc
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.data.tokenizing.chunking import Chunker
from pretrain_cli.errors import DataError

PIECE = 2**13
"""Characters encoded at once; see chunking.py."""
START = "fork" if sys.platform == "linux" else "spawn"
"""Start method of worker processes; a fork isn't safe outside Linux."""
IN_FLIGHT_PER_WORKER = 3
"""Batches submitted ahead for each worker."""


class Block(NamedTuple):
    """Part of a document's text, ending at a possible cut."""

    text: bytes
    begins: bool
    """True if the document begins here and gets its BOS mark."""
    ends: bool


class Encoded(NamedTuple):
    """Tokens of a batch of blocks, concatenated."""

    tokens: np.ndarray
    counts: list[int]
    """Number of tokens of each block."""


class Encoder:
    """Encodes batches with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self.tokenizer = tokenizer
        self.cutter = Chunker(tokenizer)
        self.dtype = dtype

    def __call__(self, batch: list[Block]) -> Encoded:
        texts: list[str] = []
        continues: list[bool] = []
        firsts = [0]
        for block in batch:
            for number, piece in enumerate(self.cutter.pieces(block.text.decode(), PIECE)):
                continued = number > 0 or not block.begins
                texts.append(self.cutter.continuing(piece) if continued else piece)
                continues.append(continued)
            firsts.append(len(texts))
        encodings = self.tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
        lead = self.cutter.lead[1] if any(continues) else 0
        ids = array.array("I")  # converts lists several times as fast as numpy
        counts = []
        for block, first, last in zip(batch, firsts, firsts[1:], strict=False):
            before = len(ids)
            if block.begins and self.tokenizer.bos is not None:
                ids.append(self.tokenizer.bos)
            for number in range(first, last):
                new = encodings[number].ids
                ids.extend(array.array("I", new[lead:] if continues[number] else new))
            if block.ends:
                ids.append(self.tokenizer.eos)
            counts.append(len(ids) - before)
        return Encoded(np.frombuffer(ids, dtype=np.uint32).astype(self.dtype), counts)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # missing on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def encoders(tokenizer: Tokenizer, dtype: np.dtype, workers: int) -> Generator[Any]:
    """Yield a function that encodes batches, keeping their order."""
    encode = Encoder(tokenizer, dtype)
    _ = encode.cutter.lead  # cached here, so that the forked workers share it
    previous = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # garbage collection writes to the objects it visits, so their memory would no longer be shared
    gc.freeze()
    try:
        if workers == 1:
            pool, work = ThreadPoolExecutor(1), encode
        else:
            context = multiprocessing.get_context(START)
            are_text = tokenizer.backend.encode_special_tokens
            pool = ProcessPoolExecutor(workers, context, _begin, (encode, are_text))
            work = _encode
        try:
            yield partial(_in_order, pool, work, IN_FLIGHT_PER_WORKER * workers)
        finally:
            pool.shutdown(cancel_futures=True)
    finally:
        gc.unfreeze()
        if previous is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = previous


def _in_order(
    pool: Executor,
    work: Callable[[list[Block]], Encoded],
    ahead: int,
    batches: Iterable[list[Block]],
) -> Iterator[Encoded]:
    under_way: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            with warnings.catch_warnings():
                # warning about forking a process with threads: workers use none of their locks
                warnings.simplefilter("ignore", DeprecationWarning)
                under_way.append(pool.submit(work, batch))
            if len(under_way) > ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a tokenizing process was ended from outside, perhaps because memory ran out; run the "
            "command again, with fewer --workers"
        ) from None


_encoder: Encoder
_thread: ThreadPoolExecutor
"""The tokenizer and its thread, in a worker process."""


def _begin(encoder: Encoder, are_text: bool) -> None:
    """Prepare a worker process. `are_text` treats special tokens in documents as plain text; a
    tokenizer loses this setting when it is pickled."""
    global _encoder, _thread
    _encoder, _thread = encoder, ThreadPoolExecutor(1)
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


def _encode(batch: list[Block]) -> Encoded:
    return _thread.submit(_encoder, batch).result()
