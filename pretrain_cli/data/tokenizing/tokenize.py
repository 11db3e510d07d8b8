"""Tokenize: from a corpus to a dataset.

One process writes tokens in the order of the corpus, so the dataset is the same for any number of
workers, and for either encoder. The position in that order is saved every few seconds; a killed run
resumes from there.

A hash of each document's text decides whether it belongs to the validation split, so the choice is
stable when the corpus grows. A corpus with too few documents for that uses its last tokens.
"""

import sqlite3
import sysconfig
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pretrain_cli.data.corpus.source_files import Corpus, find_corpus
from pretrain_cli.data.shards import Manifest
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.data.tokenizing.choose_tokenizer import TokenizerChoice
from pretrain_cli.data.tokenizing.encoder import (
    Encoder,
    EncodersDiffer,
    LibraryEncoder,
    choose_encoder,
    shortened,
)
from pretrain_cli.data.tokenizing.parts import take_part
from pretrain_cli.data.tokenizing.pipeline import Pipeline, Progress, is_small, no_progress
from pretrain_cli.data.tokenizing.progress import Encoding, SavedProgress
from pretrain_cli.data.tokenizing.request import TokenizeRequest, check
from pretrain_cli.data.tokenizing.resume import can_continue, missing_files
from pretrain_cli.data.tokenizing.writer import DatasetWriter, find_earlier
from pretrain_cli.errors import DataError
from pretrain_cli.files import is_disk_full

DEMO = Path("data/demo")
DEMO_VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Tokenized:
    """Result of tokenizing: the dataset, and what happened on the way."""

    folder: Path
    manifest: Manifest
    left_out: dict[str, str]
    """Files that were found but not read, with the reason."""
    remarked: dict[str, list[str]]
    """Files that each remark applies to."""
    was_there: bool
    """True if the dataset already existed with the same files and options; nothing was done."""
    resumed: bool
    """True if an interrupted run was continued."""
    seconds: float
    """Seconds from reading the first text to the finished dataset, without loading the
    tokenizer."""
    encoding: Encoding | None = None
    """The encoder that was used; None if nothing was done."""


def tokenize(request: TokenizeRequest, progress: Progress = no_progress) -> Tokenized:
    """Tokenize a corpus into a dataset, or return the dataset if it already exists."""
    check(request)
    corpus = find_corpus(request.paths, include=request.include, exclude=request.exclude)
    request, corpus = take_part(request, corpus)
    choice = TokenizerChoice(request, corpus, progress)
    earlier = find_earlier(request)
    existing, corpus = earlier.existing, missing_files(request, corpus, earlier, choice)
    if existing is not None and not corpus.files:
        return Tokenized(request.out, existing, {}, {}, was_there=True, resumed=False, seconds=0)
    saved = earlier.saved if can_continue(request, corpus, earlier, choice) else None
    tokenizer = choice.choose(earlier, resumes=saved is not None)
    work = _Work(request, corpus, tokenizer, existing, progress)
    if saved is not None and saved.difference:
        return work.run(saved, LibraryEncoder(tokenizer), saved.difference)
    asked = request.encoder
    if asked == "auto" and is_small(corpus):  # loading a second encoder would take longer
        asked = "tokenizers"
    encoder, why = choose_encoder(tokenizer, asked)
    try:
        return work.run(saved, encoder, why)
    except EncodersDiffer as difference:
        why = f"gigatoken gave other ids for {shortened(difference.text)}"
        if corpus.has_streams or request.encoder == "gigatoken":
            raise DataError(f"{why}; run the command again with --encoder tokenizers") from None
    return work.run(None, LibraryEncoder(tokenizer), why)


@dataclass(frozen=True)
class _Work:
    """A corpus to tokenize, apart from the encoder."""

    request: TokenizeRequest
    corpus: Corpus
    tokenizer: Tokenizer
    existing: Manifest | None
    progress: Progress

    def run(self, saved: SavedProgress | None, encoder: Encoder, why: str) -> Tokenized:
        """Make the dataset. `why` says why gigatoken isn't the encoder. Raises EncodersDiffer."""
        request, corpus = self.request, self.corpus
        began = time.perf_counter()
        dataset = DatasetWriter(request, corpus, self.tokenizer, self.existing, why)
        with _full_disk_explained(dataset.staging), dataset:
            dataset.begin(saved)
            before, probes = dataset.text_bytes, encoder.compared
            Pipeline(request, corpus, dataset, encoder, self.progress).run()
            seconds = time.perf_counter() - began
            encoding = Encoding(
                encoder=encoder.name,
                why_not_gigatoken=why,
                samples_compared=probes + dataset.blocks.compared,
                bytes_per_second=round((dataset.text_bytes - before) / seconds),
            )
            manifest = dataset.finish(encoding)
        return Tokenized(
            request.out,
            manifest,
            corpus.left_out,
            dataset.remarked,
            was_there=False,
            resumed=saved is not None,
            seconds=time.perf_counter() - began,
            encoding=encoding,
        )


def demo_request() -> TokenizeRequest:
    """Return a request for trying things out: the source code of the running Python's standard
    library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    folders = [p for p in sorted(library.iterdir()) if p.is_dir() and p.name.isidentifier()]
    kept = [p for p in folders if not p.name.startswith("__") and next(p.rglob("*.py"), None)]
    return TokenizeRequest(
        paths=tuple(map(str, (*sorted(library.glob("*.py")), *kept))),
        out=DEMO,
        tokenizer="bpe",
        vocab_size=DEMO_VOCAB_SIZE,
        val_fraction=0.005,
        include=("*.py",),
    )


@contextmanager
def _full_disk_explained(folder: Path) -> Generator[None]:
    """Raise DataError if the disk becomes full."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if not is_disk_full(error):
            raise
        raise DataError(
            f"{folder}: the disk is full; free some space and run the command again: "
            "it continues from what is finished"
        ) from None
