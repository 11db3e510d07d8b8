"""A dataset in the making: the folder `NAME.partial`, which becomes `NAME` when it is complete.

    NAME.partial/
    ├── tokenizer.json, …, files.jsonl, train-00000.bin, …   as in the dataset; see shards.py
    ├── seen.sqlite       digests of the documents so far, if duplicates are dropped
    ├── progress.json     position in the corpus, and the extent of the files at that position
    └── dataset.json      last: it marks the dataset as complete

Every few seconds the files are flushed and `progress.json` is replaced. The next writer truncates
the files to the extent in it and continues, however the previous one ended.
"""

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

from pretrain_cli.data.corpus.readers import DAMAGED
from pretrain_cli.data.corpus.source_files import Corpus, legible
from pretrain_cli.data.shards import (
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    PARTIAL,
    Amount,
    Manifest,
    read_manifest,
    rows_of,
)
from pretrain_cli.data.token_files import write_llm_c
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.data.tokenizing.block_writer import BlockWriter
from pretrain_cli.data.tokenizing.blocks import Encoded
from pretrain_cli.data.tokenizing.progress import (
    PROGRESS_VERSION,
    Cursor,
    Earlier,
    Encoding,
    SavedProgress,
)
from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.data.tokenizing.shard_writer import (
    ShardWriter,
    are_on_disk,
    settle_shards,
)
from pretrain_cli.errors import DataError
from pretrain_cli.files import sha256_of, write_whole

PROGRESS = "progress.json"
ENCODING = "encoding.json"
REPLACED = "replaced"
"""Name of the replaced dataset while the new one moves into place. It lies inside the new one,
where it cannot collide with other files."""
SECONDS_FOR_LOCK = 2.0
"""Seconds to wait for the lock: the worker processes of a killed writer hold it until they
notice."""


class DatasetWriter:
    """Writes a dataset; use as a context manager. If the block fails, saved progress stays for the
    next writer; without saved progress, everything is removed."""

    def __init__(
        self,
        request: TokenizeRequest,
        corpus: Corpus,
        tokenizer: Tokenizer,
        existing: Manifest | None = None,
        difference: str = "",
    ) -> None:
        """`existing` is the dataset to append to; `difference` the reason why gigatoken isn't the
        encoder."""
        self.request, self.corpus, self.tokenizer = request, corpus, tokenizer
        self.existing, self.difference = existing, difference
        self.folder, self.staging = request.out, _staging_dir(request.out)
        self.remarked: dict[str, list[str]] = {}
        """Remarks on files, each with the names of its files. Known at the end."""

    def __enter__(self) -> "DatasetWriter":
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.folder}: can't be made ({error.strerror}); choose another folder with --out"
            ) from None
        with ExitStack() as opened:
            lock = os.open(self.staging, os.O_RDONLY)
            opened.callback(os.close, lock)
            until = time.monotonic() + SECONDS_FOR_LOCK
            while not _is_locked(lock):
                if time.monotonic() > until:
                    raise DataError(
                        f"{self.staging}: another process is writing it; wait for it, or choose "
                        "another folder with --out"
                    )
                time.sleep(0.02)
            opened.callback(self._remove_unless_resumable)
            self.opened = opened.pop_all()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.opened.close()

    def _remove_unless_resumable(self) -> None:
        if not any((self.staging / name).exists() for name in (PROGRESS, MANIFEST)):
            shutil.rmtree(self.staging, ignore_errors=True)

    # --- beginning -------------------------------------------------------------------------------

    def begin(self, saved: SavedProgress | None = None) -> None:
        """Continue from saved progress; without it, start with what the existing dataset holds. If
        the current file changed since, progress goes back to that file's beginning."""
        if saved is None:
            self._start_over()
        elif saved.file != self._identity(saved.here.place):
            saved = saved.model_copy(update={"here": saved.file_began})
        self.blocks = BlockWriter(
            self.request,
            self.corpus,
            self.staging,
            self.tokenizer.vocab_size,
            self.existing,
            saved,
        )
        self.opened.callback(self.blocks.close)

    def _start_over(self) -> None:
        (self.staging / PROGRESS).unlink(missing_ok=True)  # first: it refers to the others
        for path in self.staging.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.tokenizer.save(self.staging)

    def _identity(self, place: Cursor) -> list[str | int] | None:
        """Return name, size and time of the file at a position; None after the last file."""
        for file in self.corpus.files[place.file : place.file + 1]:
            return [file.name, file.size, file.modified]
        return None

    # --- writing ---------------------------------------------------------------------------------

    def append(self, encoded: Encoded) -> None:
        """Append the tokens of a task."""
        self.blocks.append(encoded)

    def save_progress(self) -> None:
        """Flush the files to disk, then save the progress."""
        if self.corpus.has_streams:
            return  # a stream can't be read again from its start
        blocks = self.blocks
        progress = SavedProgress(
            version=PROGRESS_VERSION,
            options=self.request.options,
            appends_to=self.existing.fingerprint if self.existing else None,
            file=self._identity(blocks.place),
            here=blocks.reached(),
            file_began=blocks.file_began,
            shards=blocks.shards.closed,
            difference=self.difference,
        )
        blocks.flush()
        write_whole(self.staging / PROGRESS, json.dumps(progress.model_dump()))

    @property
    def shards(self) -> ShardWriter:
        return self.blocks.shards

    @property
    def text_bytes(self) -> int:
        return sum(tally.bytes for tally in self.shards.splits.values())

    @property
    def new_tokens(self) -> int:
        """Tokens beyond those of the existing dataset."""
        before = self.existing.total.tokens if self.existing else 0
        return sum(tally.tokens for tally in self.shards.splits.values()) - before

    def check_space(self, rest: float) -> None:
        """Raise DataError if the disk is too small for `rest` times the text appended so far."""
        needed = rest * self.new_tokens * self.shards.dtype.itemsize
        free = shutil.disk_usage(self.staging).free
        if needed > free:
            raise DataError(
                f"{self.folder}: the dataset will take about {needed / 1e9:,.1f} GB more, and "
                f"{free / 1e9:,.1f} GB are free there; free some, or choose another place"
            )

    # --- finishing -------------------------------------------------------------------------------

    def finish(self, encoding: Encoding) -> Manifest:
        """Complete the dataset, write its manifest, and move it into place. Raises DataError if it
        has no text."""
        request, existing, tokenizer = self.request, self.existing, self.tokenizer
        shards, splits = self.shards, self.shards.splits.values()
        self.blocks.flush()
        sources: dict[str, Amount] = {}
        remarks: Counter[str] = Counter()
        for row in rows_of(self.staging):
            amount = Amount(files=1, **{k: row[k] for k in ("documents", "bytes", "tokens")})
            sources[row["source"]] = sources.get(row["source"], Amount()) + amount
            remarks.update(row["remarks"])
            for remark in row["remarks"]:
                self.remarked.setdefault(remark, []).append(row["name"])
        if not any(tally.tokens for tally in splits):
            raise DataError(self._nothing())
        if request.val_fraction > 0 and not all(tally.tokens for tally in splits):
            shards.hold_out_tail(request.val_fraction, tokenizer.decode)
        shards.close()
        if request.format == "llm.c":
            separator = None if tokenizer.bos is not None else tokenizer.eos
            write_llm_c(self.staging, shards.closed, name=self.folder.name, separator=separator)
        write_whole(self.staging / ENCODING, encoding.model_dump_json(indent=2) + "\n")
        paths = [*(existing.paths if existing else []), *map(legible, request.paths)]
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tokenizer=tokenizer.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            dtype=shards.name,
            beginning_of_document=tokenizer.bos,
            end_of_document=tokenizer.eos,
            paths=list(dict.fromkeys(paths)),
            options=existing.options if existing else request.options,
            splits={name: Amount(**asdict(tally)) for name, tally in shards.splits.items()},
            sources=sources,
            duplicates=self.blocks.place.duplicates + (existing.duplicates if existing else 0),
            inexact_cuts=self.blocks.place.inexact_cuts
            + (existing.inexact_cuts if existing else 0),
            remarks=dict(remarks),
            files_sha256=sha256_of(self.staging / FILES),
            shards=shards.settled,
        )
        write_whole(self.staging / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        move_into_place(self.folder)
        return manifest

    def _nothing(self) -> str:
        where, count = ", ".join(self.request.paths), len(self.corpus.files)
        files = f"{count:,} file{'s' if count > 1 else ''}"
        for remark, names in self.remarked.items():
            if remark.startswith("not UTF-8"):
                return (
                    f"{where}: no UTF-8 text in its {files} ({names[0]} the first); "
                    "convert what is text"
                )
            if remark == DAMAGED:
                return f"{where}: damaged from the beginning on ({names[0]}); get it again"
        because = next((f" ({names[0]}: {why})" for why, names in self.remarked.items()), "")
        return f"{where}: no text in its {files}{because}; give a folder of text"


def move_into_place(folder: Path) -> None:
    """Move a complete dataset from its staging folder to its final place. Does nothing if there is
    no staging folder with a manifest; the manifest is what marks a dataset as complete."""
    staging = _staging_dir(folder)
    if not (staging / MANIFEST).exists():
        shutil.rmtree(folder / REPLACED, ignore_errors=True)
        return
    settle_shards(staging, read_manifest(staging).shards)
    (staging / PROGRESS).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(staging / REPLACED, ignore_errors=True)
        folder.rename(staging / REPLACED)
    staging.rename(folder)
    shutil.rmtree(folder / REPLACED, ignore_errors=True)


def find_earlier(request: TokenizeRequest) -> Earlier:
    """Return what earlier runs left, after moving a complete dataset into place. Raises DataError
    if something else is in its place."""
    out, staging = request.out, _staging_dir(request.out)
    move_into_place(out)
    if not out.exists():
        if request.append:
            raise DataError(f"{out}: no dataset there to append to; leave --append out")
    elif not (out / MANIFEST).is_file():
        if not out.is_dir() or any(out.iterdir()):
            raise DataError(f"{out}: exists and is not a dataset; choose another folder with --out")
        out.rmdir()
    existing = read_manifest(out) if out.exists() and not request.force else None
    saved, finished = None, []
    with suppress(OSError, ValueError):  # there is none, or another version of the program saved it
        read = SavedProgress.model_validate_json((staging / PROGRESS).read_bytes())
        with (staging / FILES).open("rb") as file:
            lines = file.read(read.here.written.files_bytes).splitlines()
        finished = [json.loads(line) for line in lines[max(0, len(lines) - read.here.place.file) :]]
        points = (read.here, read.file_began)
        if all(are_on_disk(staging, point.written, read.shards) for point in points):
            saved = read
    return Earlier(existing, rows_of(out), saved, finished, staging / "tokenizer.json")


def _staging_dir(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


def _is_locked(folder: int) -> bool:
    """Return whether this process now holds the lock on a folder."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
