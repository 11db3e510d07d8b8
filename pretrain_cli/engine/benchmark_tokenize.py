"""How fast text is tokenized, beside the library's own encoder.

    ours       `tokenize`: files read, documents hashed and cut, encoded, written, checksummed
    library    `encode_batch_fast` of the tokenizers library, the same documents held in memory

Both have the tokenizer loaded, and as many cores. They take turns, so that a machine that is busy
for a while is so for both.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain_cli.data.corpus import find_corpus
from pretrain_cli.data.request import TokenizeRequest
from pretrain_cli.data.text import FileReader
from pretrain_cli.data.tokenize import demo_request, tokenize
from pretrain_cli.data.tokenizer import load_tokenizer
from pretrain_cli.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One tokenizer's; medians over the rounds."""

    tokenizer: str
    workers: int
    bytes: int
    tokens: int
    seconds: float
    library_seconds: float

    @property
    def ratio(self) -> float:
        """Our rate over the library's."""
        return self.library_seconds / self.seconds


def request_for(paths: tuple[str, ...], tokenizer: str, workers: int | None) -> TokenizeRequest:
    """Tokenizing these paths, or Python's own sources where there are none."""
    demo = demo_request()
    return TokenizeRequest(
        paths=paths or demo.paths,
        include=() if paths else demo.include,
        tokenizer=tokenizer,
        out=Path(),
        workers=workers,
    )


def measure(request: TokenizeRequest, rounds: int, progress: Callable[[str], None]) -> Measurement:
    """Tokenize the request's text and encode it with the library, so many times in turn."""
    corpus = find_corpus(request.paths, include=request.include)
    if corpus.has_streams:
        raise DataError(f"{', '.join(request.paths)}: can be read once; give files or folders")
    texts = [
        b"".join(document.blocks).decode()
        for file in corpus.files
        for document in FileReader(file, request.reading).documents()
    ]
    backend = load_tokenizer(request.tokenizer).backend
    workers = request.workers or len(os.sched_getaffinity(0))
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    ours, library, tokens = [], [], 0
    for number in range(rounds):
        progress(f"{request.tokenizer}: round {number + 1} of {rounds}")
        began = time.perf_counter()
        backend.encode_batch_fast(texts, add_special_tokens=False)
        library.append(time.perf_counter() - began)
        with tempfile.TemporaryDirectory() as folder:
            made = tokenize(replace(request, out=Path(folder) / "made"), lambda *_: None)
        ours.append(made.seconds)
        tokens = made.manifest.total.tokens
    return Measurement(
        tokenizer=request.tokenizer,
        workers=workers,
        bytes=sum(len(text.encode()) for text in texts),
        tokens=tokens,
        seconds=statistics.median(ours),
        library_seconds=statistics.median(library),
    )
