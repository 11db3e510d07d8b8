"""Benchmark of tokenizing, compared with the encoders alone.

    ours        `tokenize`: reads files, hashes and cuts documents, encodes, writes, checksums
    library     `encode_batch_fast` of the tokenizers library, on the same documents in memory
    gigatoken   its `encode_batch`, where it is installed, on the same documents in memory

All have the tokenizer loaded and use the same number of cores. They take turns, so that a temporary
slowdown affects all. Each turn runs in a fresh process: the library leaves memory fragmented, which
slows later encoding in the process and in its forks.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pretrain_cli.data.corpus.readers import FileReader
from pretrain_cli.data.corpus.source_files import Corpus, find_corpus
from pretrain_cli.data.parallel import cores
from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer
from pretrain_cli.data.tokenizing.encoder import GigatokenEncoder, choose_encoder
from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.data.tokenizing.tokenize import demo_request, tokenize
from pretrain_cli.engine.runtime.fresh_process import in_a_fresh_process
from pretrain_cli.engine.runtime.host_memory import give_back_memory
from pretrain_cli.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Result for one tokenizer; medians over the rounds."""

    tokenizer: str
    workers: int
    bytes: int
    tokens: int
    seconds: float
    encoder: str
    """Package and version that our `tokenize` used."""
    library_seconds: float
    gigatoken_seconds: float | None
    """None if gigatoken isn't installed or doesn't know the tokenizer."""

    @property
    def ratio(self) -> float:
        """Our rate divided by the library's."""
        return self.library_seconds / self.seconds

    @property
    def gigatoken_ratio(self) -> float | None:
        """Our rate divided by gigatoken's."""
        return self.gigatoken_seconds and self.gigatoken_seconds / self.seconds


def request_for(paths: tuple[str, ...], tokenizer: str, workers: int | None) -> TokenizeRequest:
    """Return a request to tokenize these paths, or Python's own sources if there are none."""
    demo = demo_request()
    return TokenizeRequest(
        paths=paths or demo.paths,
        include=() if paths else demo.include,
        tokenizer=tokenizer,
        out=Path(),
        workers=workers,
    )


def measure(request: TokenizeRequest, rounds: int, progress: Callable[[str], None]) -> Measurement:
    """Tokenize the text of the request and encode it with the library, in turns."""
    corpus = find_corpus(request.paths, include=request.include)
    if corpus.has_streams:
        raise DataError(f"{', '.join(request.paths)}: can be read once; give files or folders")
    workers = request.workers or cores()
    request = replace(request, workers=workers)
    ours: list[Turn] = []
    library: list[Turn] = []
    gigatoken: list[Turn | None] = []
    for number in range(rounds):
        progress(f"{request.tokenizer}: round {number + 1} of {rounds}")
        library.append(in_a_fresh_process(library_turn, request))
        gigatoken.append(in_a_fresh_process(gigatoken_turn, request))
        ours.append(in_a_fresh_process(our_turn, request))
    return Measurement(
        tokenizer=request.tokenizer,
        workers=workers,
        bytes=ours[0].bytes,
        tokens=ours[0].tokens,
        seconds=statistics.median(turn.seconds for turn in ours),
        encoder=ours[0].encoder,
        library_seconds=statistics.median(turn.seconds for turn in library),
        gigatoken_seconds=statistics.median(t.seconds for t in gigatoken if t)
        if all(gigatoken)
        else None,
    )


class Turn(NamedTuple):
    seconds: float
    bytes: int
    """Bytes of text."""
    tokens: int
    encoder: str = ""


def our_turn(request: TokenizeRequest) -> Turn:
    give_back_memory()
    with tempfile.TemporaryDirectory() as folder:
        made = tokenize(replace(request, out=Path(folder) / "made"))
    assert made.encoding is not None
    total = made.manifest.total
    return Turn(made.seconds, total.bytes, total.tokens, made.encoding.encoder)


def library_turn(request: TokenizeRequest) -> Turn:
    """Encode with the library; tokens are counted without document marks."""
    os.environ["RAYON_NUM_THREADS"] = str(request.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    texts = list(_texts(find_corpus(request.paths, include=request.include), request))
    backend = load_tokenizer(request.tokenizer).backend
    began = time.perf_counter()
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    seconds = time.perf_counter() - began
    return Turn(seconds, sum(len(text.encode()) for text in texts), sum(map(len, encodings)))


def gigatoken_turn(request: TokenizeRequest) -> Turn | None:
    """Encode with gigatoken's own threads; None if it can't encode with this tokenizer."""
    os.environ["RAYON_NUM_THREADS"] = str(request.workers)
    encoder, _ = choose_encoder(load_tokenizer(request.tokenizer))
    if not isinstance(encoder, GigatokenEncoder):
        return None
    corpus = find_corpus(request.paths, include=request.include)
    texts = [text.encode() for text in _texts(corpus, request)]
    began = time.perf_counter()
    ids = encoder.backend.encode_batch(texts, parallel=True).layout.content
    seconds = time.perf_counter() - began
    return Turn(seconds, sum(map(len, texts)), len(ids), encoder.name)


def _texts(corpus: Corpus, request: TokenizeRequest) -> Iterator[str]:
    for file in corpus.files:
        for document in FileReader(file, request.reading).documents():
            yield b"".join(document.blocks).decode()
