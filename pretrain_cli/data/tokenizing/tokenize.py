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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain_cli.data.corpus.readers import DAMAGED, FileReader
from pretrain_cli.data.corpus.source_files import STANDARD_INPUT, Corpus, find_corpus, legible
from pretrain_cli.data.shards import FILES, Amount, Manifest, token_dtype
from pretrain_cli.data.token_files import write_llm_c
from pretrain_cli.data.tokenizers.tokenizer import (
    Tokenizer,
    load_tokenizer,
    read_tokenizer,
    train_bpe,
)
from pretrain_cli.data.tokenizing.pipeline import Pipeline, Progress, no_progress
from pretrain_cli.data.tokenizing.request import TokenizeRequest, check
from pretrain_cli.data.tokenizing.resume import existing, new_files, noted, rows_of, was_begun_with
from pretrain_cli.data.tokenizing.staging import move_into_place, staging_dir
from pretrain_cli.data.tokenizing.writer import DatasetWriter
from pretrain_cli.errors import ConfigError, DataError
from pretrain_cli.files import is_disk_full

BPE_TRAINING_BYTES = 2**25
"""Bytes of text, spread over the corpus, on which a BPE is trained. More text changes little and
takes longer."""
BPE_VOCAB_SIZE = 8192
"""Vocabulary size of a trained BPE if none is given."""
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
    if request.tokenizer == "bpe":
        _refuse_streams(corpus)
    move_into_place(request.out)  # if an earlier run was killed before this step
    there = existing(request, corpus)
    if there is not None and not request.append:
        return Tokenized(request.out, there, {}, {}, was_there=True, resumed=False, seconds=0)
    if there is not None:
        corpus = new_files(request, corpus)
        if not corpus.files:
            return Tokenized(request.out, there, {}, {}, was_there=True, resumed=False, seconds=0)

    earlier = noted(request, corpus, there)
    tokenizer = _prepare_tokenizer(request, corpus, progress, resumed=earlier is not None)
    if not was_begun_with(request, tokenizer):
        earlier = None
    if there is not None:
        if tokenizer.fingerprint != there.tokenizer_fingerprint:
            raise DataError(f"{request.out}: was made with another tokenizer; append with that one")
        tokenizer = replace(tokenizer, name=there.tokenizer)
    if request.format == "llm.c" and token_dtype(tokenizer.vocab_size) != "uint16":
        raise ConfigError(
            f"--format llm.c: holds ids below 65,536, and {tokenizer.name} has "
            f"{tokenizer.vocab_size:,}; leave it out, or choose another tokenizer"
        )
    writer = DatasetWriter(request.out, tokenizer, shard_tokens=request.shard_tokens)
    began = time.perf_counter()
    with writer:
        try:
            if earlier is not None:
                writer.go_on(earlier.here.written, earlier.shards)
            elif there is not None:
                writer.begin_behind(there)
            else:
                writer.begin()
            pipeline = Pipeline(request, corpus, writer, progress, earlier=earlier, there=there)
            pipeline.run()
            manifest = _finish(request, corpus, pipeline)
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
        corpus.left_out,
        _remarked(request.out / FILES),
        was_there=False,
        resumed=earlier is not None,
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


def _refuse_streams(corpus: Corpus) -> None:
    for file in corpus.files:
        if file.is_stream:
            name = "standard input" if file.name == STANDARD_INPUT else file.path
            raise ConfigError(
                f"--tokenizer bpe: is trained on the text first, and {name} can be read once; "
                "save it to a file"
            )


def _finish(request: TokenizeRequest, corpus: Corpus, pipeline: Pipeline) -> Manifest:
    writer, there = pipeline.writer, pipeline.there
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
    paths = [*(there.paths if there else []), *map(legible, request.paths)]
    return writer.finish(
        paths=list(dict.fromkeys(paths)),
        options=there.options if there else request.options,
        sources=shares,
        duplicates=pipeline.place.duplicates + (there.duplicates if there else 0),
        inexact_cuts=pipeline.place.inexact_cuts + (there.inexact_cuts if there else 0),
        remarks=dict(remarks),
    )


def _remarked(path: Path) -> dict[str, list[str]]:
    remarked: dict[str, list[str]] = {}
    for row in rows_of(path):
        for remark in row["remarks"]:
            remarked.setdefault(remark, []).append(row["name"])
    return remarked


def _prepare_tokenizer(
    request: TokenizeRequest, corpus: Corpus, progress: Progress, *, resumed: bool
) -> Tokenizer:
    if request.tokenizer != "bpe":
        tokenizer = load_tokenizer(request.tokenizer)
    elif resumed:
        tokenizer = read_tokenizer(staging_dir(request.out) / "tokenizer.json", name="bpe")
    else:
        size = BPE_VOCAB_SIZE if request.vocab_size is None else request.vocab_size
        tokenizer = train_bpe(_sample(request, corpus, progress), size)
    if request.tokenizer == "bpe":
        tokenizer = replace(tokenizer, name=f"bpe-{tokenizer.vocab_size}")
    return tokenizer.marked(bos=request.bos, eos=request.eos, allow_special=request.allow_special)


def _sample(request: TokenizeRequest, corpus: Corpus, progress: Progress) -> Iterator[str]:
    """Yield text spread evenly over the corpus."""
    stride = max(1, corpus.size // BPE_TRAINING_BYTES)
    number = before = 0
    for file in corpus.files:
        reader = FileReader(file, request.reading)
        for document in reader.documents():
            for block in document.blocks:
                if number % stride == 0:
                    progress("training the tokenizer", before + reader.position, corpus.size, 0)
                    yield block.decode()
                number += 1
        before += file.size


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
