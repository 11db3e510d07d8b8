"""Tokenize: from a corpus to a dataset.

One process reads text and writes tokens in one order, so the dataset is the same for any number of
workers. The position in that order is saved every few seconds; a killed run resumes from there.

A hash of each document's text decides whether it belongs to the validation split, so the choice is
stable when the corpus grows. A corpus with too few documents for that uses its last tokens.
"""

import sqlite3
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain_cli.data.corpus.readers import DAMAGED
from pretrain_cli.data.corpus.source_files import Corpus, find_corpus, legible
from pretrain_cli.data.shards import FILES, Amount, Manifest, token_dtype
from pretrain_cli.data.token_files import write_llm_c
from pretrain_cli.data.tokenizing.choose_tokenizer import TokenizerChoice
from pretrain_cli.data.tokenizing.pipeline import Pipeline, Progress, no_progress
from pretrain_cli.data.tokenizing.request import TokenizeRequest, check
from pretrain_cli.data.tokenizing.resume import find_start, rows_of
from pretrain_cli.data.tokenizing.staging import move_into_place
from pretrain_cli.data.tokenizing.writer import DatasetWriter
from pretrain_cli.errors import ConfigError, DataError
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


def tokenize(request: TokenizeRequest, progress: Progress = no_progress) -> Tokenized:
    """Tokenize a corpus into a dataset, or return the dataset if it already exists."""
    check(request)
    corpus = find_corpus(request.paths, include=request.include, exclude=request.exclude)
    choice = TokenizerChoice(request, corpus, progress)
    move_into_place(request.out)  # if an earlier run was killed before this step
    start = find_start(request, corpus, choice)
    if start.is_complete:
        assert start.existing is not None
        return Tokenized(
            request.out, start.existing, {}, {}, was_there=True, resumed=False, seconds=0
        )
    tokenizer = choice.resumed if start.saved else choice.new
    if start.existing is not None:
        if tokenizer.fingerprint != start.existing.tokenizer_fingerprint:
            raise DataError(f"{request.out}: was made with another tokenizer; append with that one")
        tokenizer = replace(tokenizer, name=start.existing.tokenizer)
    if request.format == "llm.c" and token_dtype(tokenizer.vocab_size) != "uint16":
        raise ConfigError(
            f"--format llm.c: holds ids below 65,536, and {tokenizer.name} has "
            f"{tokenizer.vocab_size:,}; leave it out, or choose another tokenizer"
        )
    began = time.perf_counter()
    with DatasetWriter(request.out, tokenizer, shard_tokens=request.shard_tokens) as writer:
        try:
            if start.saved is not None:
                writer.resume(start.saved.here.written, start.saved.shards)
            elif start.existing is not None:
                writer.begin_after(start.existing)
            else:
                writer.begin()
            pipeline = Pipeline(
                request,
                start.corpus,
                writer,
                progress,
                saved=start.saved,
                appends_to=start.existing,
            )
            pipeline.run()
            manifest = _finish(request, start.corpus, pipeline)
        except (OSError, sqlite3.Error) as error:
            if not is_disk_full(error):
                raise
            raise DataError(
                f"{writer.staging}: the disk is full; free some space and run the command again: "
                "it continues from what is finished"
            ) from None
    return Tokenized(
        request.out,
        manifest,
        start.corpus.left_out,
        _remarked(request.out / FILES),
        was_there=False,
        resumed=start.saved is not None,
        seconds=time.perf_counter() - began,
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


def _finish(request: TokenizeRequest, corpus: Corpus, pipeline: Pipeline) -> Manifest:
    writer, existing = pipeline.writer, pipeline.appends_to
    if not writer.tokens:
        raise DataError(_nothing(request, corpus, writer))
    empty = [name for name, tally in writer.splits.items() if not tally.tokens]
    if request.val_fraction > 0 and empty:
        writer.hold_out_tail(request.val_fraction)
    writer.files.flush()
    shares: dict[str, Amount] = {}
    remarks: Counter[str] = Counter()
    for row in rows_of(writer.staging / FILES):
        amount = Amount(files=1, **{k: row[k] for k in ("documents", "bytes", "tokens")})
        shares[row["source"]] = shares.get(row["source"], Amount()) + amount
        remarks.update(row["remarks"])
    if request.format == "llm.c":
        writer.close_shards()
        separator = None if writer.tokenizer.bos is not None else writer.tokenizer.eos
        write_llm_c(writer.staging, writer.closed, name=request.out.name, separator=separator)
    paths = [*(existing.paths if existing else []), *map(legible, request.paths)]
    return writer.finish(
        paths=list(dict.fromkeys(paths)),
        options=existing.options if existing else request.options,
        sources=shares,
        duplicates=pipeline.place.duplicates + (existing.duplicates if existing else 0),
        inexact_cuts=pipeline.place.inexact_cuts + (existing.inexact_cuts if existing else 0),
        remarks=dict(remarks),
    )


def _remarked(path: Path) -> dict[str, list[str]]:
    remarked: dict[str, list[str]] = {}
    for row in rows_of(path):
        for remark in row["remarks"]:
            remarked.setdefault(remark, []).append(row["name"])
    return remarked


def _nothing(request: TokenizeRequest, corpus: Corpus, writer: DatasetWriter) -> str:
    where, count = ", ".join(request.paths), len(corpus.files)
    files = f"{count:,} file{'s' if count > 1 else ''}"
    writer.files.flush()
    for remark, names in _remarked(writer.staging / FILES).items():
        if remark.startswith("not UTF-8"):
            return (
                f"{where}: no UTF-8 text in its {files} ({names[0]} the first); "
                "convert what is text"
            )
        if remark == DAMAGED:
            return f"{where}: damaged from the beginning on ({names[0]}); get it again"
    return f"{where}: no text in its {files}; give a folder of text"
