"""Dataset writer: writes a dataset to the staging folder `NAME.partial` and moves it into place
when complete.

Every few seconds the files are flushed and their extent is saved in `progress.json`. The next
writer truncates the files to that extent and continues, however the previous one ended.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain_cli.data.shards import (
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    Amount,
    IndexedStarts,
    Manifest,
    Shard,
    SplitName,
    TokenStream,
    TokenType,
    blocks_path,
    index_path,
    token_dtype,
)
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.data.tokenizing.open_shard import Extent, OpenShard, close_anyhow
from pretrain_cli.data.tokenizing.staging import (
    NEW,
    PROGRESS,
    Tally,
    WriteState,
    files_of,
    move_into_place,
    remove_shards,
    staging_dir,
)
from pretrain_cli.errors import DataError
from pretrain_cli.files import flush, sha256_of, write_whole

SECONDS_FOR_LOCK = 2.0
"""Seconds to wait for the lock: the worker processes of a killed writer hold it until they
notice."""
TAIL_BLOCK = 2**20
"""Tokens moved at a time when the end of one split becomes the other split."""


class DatasetWriter:
    """Writes a dataset; use as a context manager. If the block fails, saved progress stays for the
    next writer; without saved progress, everything is removed."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, shard_tokens: int) -> None:
        self.folder = folder
        self.staging = staging_dir(folder)
        self.tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        self.name: TokenType = token_dtype(tokenizer.vocab_size)
        self.dtype = np.dtype(self.name).newbyteorder("<")
        self.open: dict[SplitName, OpenShard] = {}
        self.closed: list[Shard] = []
        self.splits: dict[SplitName, Tally] = {"train": Tally(), "val": Tally()}
        self.ending = ".bin"
        """Suffix of shard names."""

    def __enter__(self) -> "DatasetWriter":
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.folder}: can't be made ({error.strerror}); choose another folder with --out"
            ) from None
        self.lock = os.open(self.staging, os.O_RDONLY)
        until = time.monotonic() + SECONDS_FOR_LOCK
        while not _is_locked(self.lock):
            if time.monotonic() > until:
                os.close(self.lock)
                raise DataError(
                    f"{self.staging}: another process is writing it; wait for it, or choose "
                    "another "
                    "folder with --out"
                )
            time.sleep(0.02)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for shard in self.open.values():
            shard.abandon()
        if hasattr(self, "files"):
            close_anyhow(self.files)
        if not any((self.staging / name).exists() for name in (PROGRESS, MANIFEST)):
            shutil.rmtree(self.staging, ignore_errors=True)
        os.close(self.lock)

    # --- beginning -------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a new dataset."""
        (self.staging / PROGRESS).unlink(missing_ok=True)  # first: it refers to the others
        for path in self.staging.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.tokenizer.save(self.staging)
        self.files = (self.staging / FILES).open("ab")

    def begin_after(self, manifest: Manifest) -> None:
        """Start after the contents of an existing dataset; its shards are hard-linked, not
        copied."""
        self.begin()
        for shard in manifest.shards:
            for file in files_of(self.folder, shard.file):
                _link(file, self.staging / file.name)
        self.files.write((self.folder / FILES).read_bytes())
        self.closed = list(manifest.shards)
        self.splits = {
            name: Tally(part.documents, part.bytes, part.tokens)
            for name, part in manifest.splits.items()
        }

    def resume(self, written: WriteState, shards: Sequence[Shard]) -> None:
        """Continue from the saved state and finished shards of an earlier writer."""
        closed = list(shards[: written.closed])
        kept = {file.name for shard in closed for file in files_of(self.staging, shard.file)}
        for extent in written.open.values():
            kept |= {extent.file, index_path(self.staging / extent.file).name}
        remove_shards(self.staging, but=kept)
        self.closed = closed
        self.splits = {name: replace(tally) for name, tally in written.splits.items()}
        for split, extent in written.open.items():
            path = self.staging / extent.file
            self.open[split] = OpenShard.reopened(split, path, self.dtype, extent)
        os.truncate(self.staging / FILES, written.files_bytes)
        self.files = (self.staging / FILES).open("ab")

    # --- writing ---------------------------------------------------------------------------------

    def add(self, split: SplitName, tokens: np.ndarray, starts: Sequence[int] | np.ndarray) -> None:
        """Append tokens, and the positions among them at which documents begin."""
        begins = np.asarray(starts, dtype=np.int64)
        tokens = np.ascontiguousarray(tokens, dtype=self.dtype)
        while len(tokens):
            shard = self.open.get(split)
            if shard is not None and shard.tokens >= self.shard_tokens:
                self.closed.append(self.open.pop(split).close())
                shard = None
            if shard is None:
                shard = self.open[split] = self._next_shard(split)
            room = self.shard_tokens - shard.tokens
            here = begins < room
            shard.add(tokens[:room], begins[here])
            self.splits[split].tokens += len(tokens[:room])
            self.splits[split].documents += int(here.sum())
            tokens, begins = tokens[room:], begins[~here] - room

    def file_done(self, row: dict[str, Any]) -> None:
        """Append a line to files.jsonl."""
        self.files.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    @property
    def tokens(self) -> int:
        return sum(tally.tokens for tally in self.splits.values())

    def written(self) -> WriteState:
        """Return the current state of writing."""
        return WriteState(
            dtype=self.name,
            closed=len(self.closed),
            open={split: shard.extent for split, shard in self.open.items()},
            splits={name: replace(tally) for name, tally in self.splits.items()},
            files_bytes=self.files.tell(),
        )

    def save_progress(self, progress: dict[str, Any]) -> None:
        """Flush the files to disk, then save the progress."""
        shards = [shard.model_dump() for shard in self.closed]
        for shard in self.open.values():
            shard.flush()
        flush(self.files)
        write_whole(self.staging / PROGRESS, json.dumps(progress | {"shards": shards}))

    def close_shards(self) -> None:
        self.closed += [shard.close() for shard in self.open.values()]
        self.open.clear()

    def hold_out_tail(self, fraction: float) -> None:
        """Make the last tokens the validation split and all others the training split, for a corpus
        whose documents all fell into one split. May cut a document."""
        self.close_shards()
        self.closed = [self._as_training(shard) for shard in self.closed]
        whole = max(self.splits.values(), key=lambda tally: tally.tokens)
        self.splits = {"train": whole, "val": Tally()}
        cut = max(1, whole.tokens - max(2, round(whole.tokens * fraction)))

        paths = [self.staging / shard.file for shard in self.closed]
        row = TokenStream(paths, self.name)
        index = [np.fromfile(index_path(path), "<u8") for path in paths]
        offsets = row.borders
        starts = IndexedStarts(index, offsets[:-1])
        text_bytes = 0
        # saved progress refers to the old shards: they stay unchanged until the manifest is written
        self.ending = f"{NEW}.bin"
        for first in range(cut, whole.tokens, TAIL_BLOCK):
            last = min(first + TAIL_BLOCK, whole.tokens)
            begins = starts.between(first, last) - first
            if first == cut and 0 not in begins:
                begins = np.concatenate(([0], begins))  # the rest of a cut document begins here
            tokens = row.read(first, last - first)
            self.add("val", tokens, begins)
            text_bytes += len(self.tokenizer.decode(tokens.tolist()).encode())
        self.splits["val"].bytes = min(text_bytes, whole.bytes)

        # for the same reason, truncate a copy of the shard that contains the cut
        kept = int(np.searchsorted(offsets[1:], cut))
        extent = Extent(
            file=f"train-{kept:05d}{NEW}.bin",
            tokens=cut - offsets[kept],
            documents=len(starts.between(offsets[kept], cut)),
        )
        path = self.staging / extent.file
        shutil.copyfile(paths[kept], path)
        shutil.copyfile(index_path(paths[kept]), index_path(path))
        self.open["train"] = OpenShard.reopened("train", path, self.dtype, extent)
        before = sum(shard.documents for shard in self.closed[:kept])
        self.closed = [
            *self.closed[:kept],
            *(shard for shard in self.closed if shard.split == "val"),
        ]
        self.splits["train"] = Tally(
            documents=before + extent.documents,
            bytes=whole.bytes - self.splits["val"].bytes,
            tokens=cut,
        )

    def finish(self, **facts: Any) -> Manifest:
        """Close the shards, write the manifest, and move everything into place."""
        self.close_shards()
        flush(self.files)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tokenizer=self.tokenizer.name,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            dtype=self.name,
            beginning_of_document=self.tokenizer.bos,
            end_of_document=self.tokenizer.eos,
            files_sha256=sha256_of(self.staging / FILES),
            splits={name: Amount(**asdict(tally)) for name, tally in self.splits.items()},
            shards=sorted(
                (s.model_copy(update={"file": s.file.replace(NEW, "")}) for s in self.closed),
                key=lambda shard: shard.file,
            ),
            **facts,
        )
        write_whole(self.staging / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        move_into_place(self.folder)
        return manifest

    def _next_shard(self, split: SplitName) -> OpenShard:
        number = sum(shard.split == split for shard in self.closed)
        name = f"{split}-{number:05d}{self.ending}"
        for path in files_of(self.staging, name):
            path.unlink(missing_ok=True)
        return OpenShard(split, self.staging / name, self.dtype)

    def _as_training(self, shard: Shard) -> Shard:
        if shard.split == "train":
            return shard
        path = self.staging / shard.file
        new = path.with_name(path.name.replace("val-", "train-"))
        for of in (Path, index_path, blocks_path):
            _link(of(path), of(new))
        return shard.model_copy(update={"file": new.name, "split": "train"})


def _is_locked(folder: int) -> bool:
    """Return whether this process now holds the lock on a folder."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or no support for links
        shutil.copyfile(source, target)
