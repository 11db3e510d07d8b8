"""Find what earlier runs left: a complete dataset, one to append to, or part of one to continue.

out exists, same request ──────────────> nothing to do
out exists, --append ──────────────────> the files that it lacks
out.partial with saved progress ───────> continue from there
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain_cli.data.corpus.source_files import Corpus, TextFile
from pretrain_cli.data.shards import (
    FILES,
    MANIFEST,
    Manifest,
    Shard,
    index_path,
    read_manifest,
)
from pretrain_cli.data.tokenizers.tokenizer import BUILT_IN, find_file
from pretrain_cli.data.tokenizing.choose_tokenizer import TokenizerChoice
from pretrain_cli.data.tokenizing.open_shard import Extent
from pretrain_cli.data.tokenizing.pipeline import Cursor, ResumePoint, SavedProgress, identity
from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.data.tokenizing.staging import (
    PROGRESS,
    Tally,
    WriteState,
    files_of,
    staging_dir,
)
from pretrain_cli.errors import DataError
from pretrain_cli.files import sha256_of


@dataclass(frozen=True)
class Start:
    """State in which tokenizing starts."""

    corpus: Corpus
    """Files to tokenize; all files if nothing is to be done."""
    existing: Manifest | None
    """Dataset that exists already: the result, or what is appended to."""
    saved: SavedProgress | None
    """Progress of an interrupted run that can be continued."""
    is_complete: bool
    """True if the existing dataset is the result, and nothing is to be done."""


def find_start(request: TokenizeRequest, corpus: Corpus, choice: TokenizerChoice) -> Start:
    """Return what earlier runs left of the requested dataset. Raises DataError if another dataset,
    or something else, is in its place."""
    manifest = _existing(request, corpus, choice)
    if manifest is not None and request.append:
        corpus = _new_files(request, corpus)
    if manifest is not None and not (request.append and corpus.files):
        return Start(corpus, manifest, None, is_complete=True)
    saved = _saved_progress(request, corpus, manifest)
    if saved is not None and not _was_begun_with(request, choice):
        saved = None
    return Start(corpus, manifest, saved, is_complete=False)


def _existing(request: TokenizeRequest, corpus: Corpus, choice: TokenizerChoice) -> Manifest | None:
    """Return the manifest of an existing dataset if it matches the request or can be appended to.
    Raises DataError instead of replacing another dataset."""
    out = request.out
    if not out.exists():
        if request.append:
            raise DataError(f"{out}: no dataset there to append to; leave --append out")
        return None
    if not (out / MANIFEST).is_file():
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
            return None
        raise DataError(f"{out}: exists and is not a dataset; choose another folder with --out")
    if request.force:
        return None
    manifest = read_manifest(out)
    changed = [
        name for name, value in request.options.items() if manifest.options.get(name) != value
    ]
    if "tokenizer" in changed and request.tokenizer not in BUILT_IN:
        find_file(request.tokenizer)  # raises if there is no such tokenizer
    if request.tokenizer not in BUILT_IN and Path(request.tokenizer).exists():
        same = _same_by_tokenizer(request, manifest, choice)
        changed = [name for name in changed if name not in same]
        changed += [name for name, is_same in same.items() if not is_same]
    if not request.append and not _is_same_corpus(corpus, out):
        changed.append("corpus")
    if not changed:
        return manifest
    what = ", ".join(name.replace("_", "-") for name in changed)
    raise DataError(
        f"{out}: holds a dataset made with another {what}; replace it with --force, "
        + ("add new files to it with --append, " if changed == ["corpus"] else "")
        + "or choose another folder with --out"
    )


def _same_by_tokenizer(
    request: TokenizeRequest, manifest: Manifest, choice: TokenizerChoice
) -> dict[str, bool]:
    """Return the options that a tokenizer file decides, and whether each matches the dataset. The
    tokenizer itself is compared, not its path: its file may have moved, be the dataset's copy, or
    carry its document marks."""
    tokenizer = choice.named
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        return {"tokenizer": False}
    marked = tokenizer.marked(bos=request.bos, eos=request.eos, allow_special=False)
    return {
        "tokenizer": True,
        "vocab_size": True,
        "bos": marked.bos == manifest.beginning_of_document,
        "eos": marked.eos == manifest.end_of_document,
    }


def _is_same_corpus(corpus: Corpus, out: Path) -> bool:
    rows = rows_of(out / FILES)
    for file in corpus.files:
        row = next(rows, None)
        if row is None or row["name"] != file.name or not _is_unchanged(file, row):
            return False
    return next(rows, None) is None


def _new_files(request: TokenizeRequest, corpus: Corpus) -> Corpus:
    """Return the files that the dataset does not contain yet. Raises DataError for one that it
    contains in another version."""
    names = {file.name for file in corpus.files}
    kept = ("size", "modified", "sha256")
    rows = {
        row["name"]: {key: row[key] for key in kept}
        for row in rows_of(request.out / FILES)
        if row["name"] in names
    }
    new = []
    for file in corpus.files:
        row = rows.get(file.name)
        if row is None or file.is_stream:
            new.append(file)
        elif not _is_unchanged(file, row):
            raise DataError(
                f"{file.path}: not what {request.out} has under the name {file.name}; rename it "
                "if it is another file, or tokenize all again with --force if it has changed"
            )
    return replace(corpus, files=new)


def _is_unchanged(file: TextFile, row: dict[str, Any]) -> bool:
    """Compare size and time; if only the time differs, compare the contents."""
    if file.is_stream or file.size != row["size"]:
        return False
    return file.modified == row["modified"] or sha256_of(file.path) == row["sha256"]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Return the lines of a files.jsonl."""
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def _saved_progress(
    request: TokenizeRequest, corpus: Corpus, existing: Manifest | None
) -> SavedProgress | None:
    """Return an earlier run's progress if it can be continued. If the current file changed since,
    progress goes back to that file's beginning."""
    progress = read_progress(request.out)
    if progress is None or corpus.has_streams:
        return None
    try:
        return _fitting(request, corpus, existing, progress)
    except (KeyError, TypeError, ValueError):  # saved by another version of the program
        return None


def read_progress(folder: Path) -> dict[str, Any] | None:
    """Return the progress that an interrupted writer saved; None if there is none."""
    try:
        return json.loads((staging_dir(folder) / PROGRESS).read_text())
    except (OSError, ValueError):
        return None


def saved_shards(progress: dict[str, Any]) -> list[Shard]:
    """Return the shards that were finished when the progress was saved."""
    return [Shard.model_validate(shard) for shard in progress["shards"]]


def as_written(folder: Path, saved: dict[str, Any], shards: Sequence[Shard]) -> WriteState | None:
    """Return the saved state of the writer; None if its files are missing."""
    extents = {split: Extent(**extent) for split, extent in saved["open"].items()}
    staging = staging_dir(folder)
    sizes = {file: 0 for s in shards[: saved["closed"]] for file in files_of(staging, s.file)}
    for extent in extents.values():
        sizes[staging / extent.file] = extent.tokens * np.dtype(saved["dtype"]).itemsize
        sizes[index_path(staging / extent.file)] = extent.documents * 8
    if not all(path.exists() and path.stat().st_size >= size for path, size in sizes.items()):
        return None
    splits = {name: Tally(**tally) for name, tally in saved["splits"].items()}
    return WriteState(saved["dtype"], saved["closed"], extents, splits, saved["files_bytes"])


def _was_begun_with(request: TokenizeRequest, choice: TokenizerChoice) -> bool:
    """Return whether the saved progress used this tokenizer, which may be a file."""
    path = staging_dir(request.out) / "tokenizer.json"
    return path.is_file() and sha256_of(path) == choice.resumed.fingerprint


def _fitting(
    request: TokenizeRequest, corpus: Corpus, existing: Manifest | None, progress: dict[str, Any]
) -> SavedProgress | None:
    appends_to = existing.fingerprint if existing else None
    if progress["options"] != request.options or progress["appends_to"] != appends_to:
        return None
    shards = saved_shards(progress)

    def resume_point(name: str) -> ResumePoint | None:
        saved = progress[name]
        written = as_written(request.out, saved["written"], shards)
        place = Cursor(*saved["place"])
        if written is None or not _begins_with_the_same(request, corpus, place.file, written):
            return None
        return ResumePoint(place, Tally(**saved["of_file"]), written)

    file_began = resume_point("file_began")
    number = progress["here"]["place"][0]
    is_unchanged = number >= len(corpus.files) or identity(corpus.files[number]) == progress["file"]
    here = resume_point("here") if is_unchanged else file_began
    return SavedProgress(here, file_began, shards) if here and file_began else None


def _begins_with_the_same(
    request: TokenizeRequest, corpus: Corpus, count: int, written: WriteState
) -> bool:
    """Return whether the finished files are still the first ones of the corpus."""
    with (staging_dir(request.out) / FILES).open("rb") as file:
        lines = file.read(written.files_bytes).splitlines()
    done = lines[len(lines) - count :]
    return len(done) == count and all(
        row["name"] == file.name and _is_unchanged(file, row)
        for row, file in zip(map(json.loads, done), corpus.files, strict=False)
    )
