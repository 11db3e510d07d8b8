"""Compare what earlier runs left with what is asked for.

out exists, same request ──────────────> nothing to do
out exists, --append ──────────────────> the files that it lacks
out.partial with saved progress ───────> continue from there
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from pretrain_cli.data.corpus.source_files import Corpus, TextFile
from pretrain_cli.data.shards import Manifest
from pretrain_cli.data.tokenizers.tokenizer import BUILT_IN, find_file
from pretrain_cli.data.tokenizing.choose_tokenizer import TokenizerChoice
from pretrain_cli.data.tokenizing.progress import Earlier, Row
from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.errors import DataError
from pretrain_cli.files import sha256_of


def missing_files(
    request: TokenizeRequest, corpus: Corpus, earlier: Earlier, choice: TokenizerChoice
) -> Corpus:
    """Return the files of the corpus that the dataset lacks. Raises DataError if the dataset was
    made with other options or, unless appending, from another corpus."""
    if (manifest := earlier.existing) is None:
        return corpus
    changed = [
        name for name, value in request.options.items() if manifest.options.get(name) != value
    ]
    if "tokenizer" in changed and request.tokenizer not in BUILT_IN:
        find_file(request.tokenizer)  # raises if there is no such tokenizer
    if request.tokenizer not in BUILT_IN and Path(request.tokenizer).exists():
        same = _same_by_tokenizer(request, manifest, choice)
        changed = [name for name in changed if name not in same]
        changed += [name for name, is_same in same.items() if not is_same]
    if not request.append and not _are_same(corpus.files, earlier.rows):
        changed.append("corpus")
    if changed:
        what = ", ".join(name.replace("_", "-") for name in changed)
        raise DataError(
            f"{request.out}: holds a dataset made with another {what}; replace it with --force, "
            + ("add new files to it with --append, " if changed == ["corpus"] else "")
            + "or choose another folder with --out"
        )
    return replace(
        corpus, files=_new_files(request, corpus, earlier.rows) if request.append else []
    )


def can_continue(
    request: TokenizeRequest, corpus: Corpus, earlier: Earlier, choice: TokenizerChoice
) -> bool:
    """Return whether an interrupted run has saved progress that this run can continue."""
    saved, existing = earlier.saved, earlier.existing
    if saved is None or corpus.has_streams or saved.options != request.options:
        return False
    return (
        saved.appends_to == (existing.fingerprint if existing else None)
        and _are_same(corpus.files[: saved.here.place.file], earlier.finished)
        and choice.is_in(earlier.tokenizer)
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


def _are_same(files: Iterable[TextFile], rows: Iterable[Row]) -> bool:
    """Return whether the files are those of a files.jsonl, in the same order and unchanged."""
    return all(
        file and row and file.name == row["name"] and _is_unchanged(file, row)
        for file, row in zip_longest(files, rows)
    )


def _new_files(request: TokenizeRequest, corpus: Corpus, rows: Iterable[Row]) -> list[TextFile]:
    """Return the files that the dataset does not contain yet. Raises DataError for one that it
    contains in another version."""
    names = {file.name for file in corpus.files}
    kept = ("size", "modified", "sha256")
    known = {row["name"]: {key: row[key] for key in kept} for row in rows if row["name"] in names}
    new = []
    for file in corpus.files:
        row = known.get(file.name)
        if row is None or file.is_stream:
            new.append(file)
        elif not _is_unchanged(file, row):
            raise DataError(
                f"{file.path}: not what {request.out} has under the name {file.name}; rename it "
                "if it is another file, or tokenize all again with --force if it has changed"
            )
    return new


def _is_unchanged(file: TextFile, row: Row) -> bool:
    """Compare size and time; if only the time differs, compare the contents."""
    if file.is_stream or file.size != row["size"]:
        return False
    return file.modified == row["modified"] or sha256_of(file.path) == row["sha256"]
