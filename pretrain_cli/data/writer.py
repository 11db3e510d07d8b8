"""Writes a dataset aside, in `NAME.partial`, and moves it into place when it is whole.

Every few seconds what is written is flushed and its extent noted in `progress.json`. A writer that
finds such a note cuts the files back to it and goes on there, whatever ended the one before.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from pretrain_cli.data.shards import (
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    Amount,
    Checksums,
    IndexedStarts,
    Manifest,
    Shard,
    SplitName,
    TokenStream,
    TokenType,
    blocks_path,
    index_path,
    read_manifest,
    token_dtype,
)
from pretrain_cli.data.tokenizer import Tokenizer
from pretrain_cli.errors import DataError
from pretrain_cli.files import flush, sha256_of, write_whole

PROGRESS = "progress.json"
NEW = ".new"
"""In the name of a shard that takes the place of one of the same name when all is whole."""
TAIL_BLOCK = 2**20
"""Tokens moved at once when the end of a split becomes the other."""


@dataclass
class Tally:
    """How much text something is so far."""

    documents: int = 0
    bytes: int = 0
    """Of whole documents."""
    tokens: int = 0


@dataclass(frozen=True)
class Extent:
    """How far an unfinished shard goes."""

    file: str
    tokens: int
    documents: int


@dataclass(frozen=True)
class Written:
    """What a dataset holds at one moment of its writing."""

    dtype: TokenType
    closed: int
    """Shards that are finished; none is ever changed."""
    open: dict[SplitName, Extent]
    splits: dict[SplitName, Tally]
    files_bytes: int
    """Length of files.jsonl."""


@dataclass
class _OpenShard:
    """A shard being written."""

    split: SplitName
    path: Path
    dtype: np.dtype
    tokens: int = 0
    documents: int = 0
    largest: int = 0
    checksums: Checksums = field(default_factory=Checksums)

    def __post_init__(self) -> None:
        self.data: IO[bytes] = self.path.open("ab")
        self.index: IO[bytes] = index_path(self.path).open("ab")

    @classmethod
    def reopened(
        cls, split: SplitName, path: Path, dtype: np.dtype, extent: Extent
    ) -> "_OpenShard":
        """A shard cut back to what it was."""
        os.truncate(path, extent.tokens * dtype.itemsize)
        os.truncate(index_path(path), extent.documents * 8)
        shard = cls(split, path, dtype, extent.tokens, extent.documents)
        with path.open("rb") as file:  # read, since what is mapped counts as memory taken
            while len(part := np.fromfile(file, dtype, TAIL_BLOCK)):
                shard.checksums.add(part)
                shard.largest = max(shard.largest, int(part.max()))
        return shard

    def add(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        self.data.write(tokens.data)
        self.checksums.add(tokens)
        if len(starts):
            self.index.write((starts + self.tokens).astype("<u8").tobytes())
        self.tokens += len(tokens)
        self.documents += len(starts)
        self.largest = max(self.largest, int(tokens.max()))

    @property
    def extent(self) -> Extent:
        return Extent(self.path.name, self.tokens, self.documents)

    def flush(self) -> None:
        flush(self.data)
        flush(self.index)

    def close(self) -> Shard:
        self.flush()
        self.abandon()
        blocks = self.checksums.blocks_bytes()
        blocks_path(self.path).write_bytes(blocks)
        return Shard(
            file=self.path.name,
            split=self.split,
            tokens=self.tokens,
            documents=self.documents,
            largest_token=self.largest,
            sha256=self.checksums.whole.hexdigest(),
            index_sha256=sha256_of(index_path(self.path)),
            blocks_sha256=sha256_of(blocks_path(self.path)),
        )

    def abandon(self) -> None:
        _close(self.data)
        _close(self.index)


class DatasetWriter:
    """A dataset in the making; a context manager. Where its block fails, what is noted stays for
    the next writer, and nothing stays where nothing was noted."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, shard_tokens: int) -> None:
        self.folder = folder
        self.aside = aside(folder)
        self.tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        self.name: TokenType = token_dtype(tokenizer.vocab_size)
        self.dtype = np.dtype(self.name).newbyteorder("<")
        self.open: dict[SplitName, _OpenShard] = {}
        self.closed: list[Shard] = []
        self.splits: dict[SplitName, Tally] = {"train": Tally(), "val": Tally()}
        self.ending = ".bin"
        """Of the names of shards."""

    def __enter__(self) -> "DatasetWriter":
        try:
            self.aside.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.folder}: can't be made ({error.strerror}); choose another folder with --out"
            ) from None
        self.lock = os.open(self.aside, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock)
            raise DataError(
                f"{self.aside}: another process is writing it; wait for it, or choose another "
                "folder with --out"
            ) from None
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for shard in self.open.values():
            shard.abandon()
        if hasattr(self, "files"):
            _close(self.files)
        if not any((self.aside / name).exists() for name in (PROGRESS, MANIFEST)):
            shutil.rmtree(self.aside, ignore_errors=True)
        os.close(self.lock)

    # --- beginning -------------------------------------------------------------------------------

    def begin(self) -> None:
        """From nothing."""
        for path in self.aside.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.tokenizer.save(self.aside)
        self.files = (self.aside / FILES).open("ab")

    def begin_behind(self, manifest: Manifest) -> None:
        """Behind what the folder holds; its shards are linked, not copied."""
        self.begin()
        for shard in manifest.shards:
            for file in files_of(self.folder, shard.file):
                _link(file, self.aside / file.name)
        self.files.write((self.folder / FILES).read_bytes())
        self.closed = list(manifest.shards)
        self.splits = {
            name: Tally(part.documents, part.bytes, part.tokens)
            for name, part in manifest.splits.items()
        }

    def go_on(self, written: Written, shards: Sequence[Shard]) -> None:
        """From what a writer before this one noted, and the shards that it had finished."""
        closed = list(shards[: written.closed])
        kept = {file.name for shard in closed for file in files_of(self.aside, shard.file)}
        for extent in written.open.values():
            kept |= {extent.file, index_path(self.aside / extent.file).name}
        _remove_shards(self.aside, but=kept)
        self.closed = closed
        self.splits = {name: replace(tally) for name, tally in written.splits.items()}
        for split, extent in written.open.items():
            path = self.aside / extent.file
            self.open[split] = _OpenShard.reopened(split, path, self.dtype, extent)
        os.truncate(self.aside / FILES, written.files_bytes)
        self.files = (self.aside / FILES).open("ab")

    # --- writing ---------------------------------------------------------------------------------

    def add(self, split: SplitName, tokens: np.ndarray, starts: Sequence[int] | np.ndarray) -> None:
        """Tokens behind those that there are, and where among them documents begin."""
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
        """A line for files.jsonl."""
        self.files.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    @property
    def tokens(self) -> int:
        return sum(tally.tokens for tally in self.splits.values())

    def written(self) -> Written:
        """What there is now."""
        return Written(
            dtype=self.name,
            closed=len(self.closed),
            open={split: shard.extent for split, shard in self.open.items()},
            splits={name: replace(tally) for name, tally in self.splits.items()},
            files_bytes=self.files.tell(),
        )

    def note(self, progress: dict[str, Any]) -> None:
        """Bring what is written onto the disk, and note the progress that it stands for."""
        shards = [shard.model_dump() for shard in self.closed]
        for shard in self.open.values():
            shard.flush()
        flush(self.files)
        write_whole(self.aside / PROGRESS, json.dumps(progress | {"shards": shards}))

    def close_shards(self) -> None:
        self.closed += [shard.close() for shard in self.open.values()]
        self.open.clear()

    def hold_out_tail(self, fraction: float) -> None:
        """Make the last tokens the validation split, and all others the training split: for a
        corpus whose documents all fell on one side. A document may be cut for it."""
        self.close_shards()
        self.closed = [self._as_training(shard) for shard in self.closed]
        whole = max(self.splits.values(), key=lambda tally: tally.tokens)
        self.splits = {"train": whole, "val": Tally()}
        cut = max(1, whole.tokens - max(2, round(whole.tokens * fraction)))

        paths = [self.aside / shard.file for shard in self.closed]
        row = TokenStream(paths, self.name)
        index = [np.fromfile(index_path(path), "<u8") for path in paths]
        offsets = row.borders
        starts = IndexedStarts(index, offsets[:-1])
        text_bytes = 0
        self.ending = f"{NEW}.bin"  # what is noted is left as it is until the manifest is written
        for first in range(cut, whole.tokens, TAIL_BLOCK):
            last = min(first + TAIL_BLOCK, whole.tokens)
            begins = starts.between(first, last) - first
            if first == cut and 0 not in begins:
                begins = np.concatenate(([0], begins))  # the rest of a document begins here
            tokens = row.read(first, last - first)
            self.add("val", tokens, begins)
            text_bytes += len(self.tokenizer.decode(tokens.tolist()).encode())
        self.splits["val"].bytes = min(text_bytes, whole.bytes)

        # likewise, of the shard that the cut is in a copy is cut
        kept = int(np.searchsorted(offsets[1:], cut))
        extent = Extent(
            file=f"train-{kept:05d}{NEW}.bin",
            tokens=cut - offsets[kept],
            documents=len(starts.between(offsets[kept], cut)),
        )
        path = self.aside / extent.file
        shutil.copyfile(paths[kept], path)
        shutil.copyfile(index_path(paths[kept]), index_path(path))
        self.open["train"] = _OpenShard.reopened("train", path, self.dtype, extent)
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
            files_sha256=sha256_of(self.aside / FILES),
            splits={name: Amount(**asdict(tally)) for name, tally in self.splits.items()},
            shards=sorted(
                (s.model_copy(update={"file": s.file.replace(NEW, "")}) for s in self.closed),
                key=lambda shard: shard.file,
            ),
            **facts,
        )
        write_whole(self.aside / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        move_into_place(self.folder)
        return manifest

    def _next_shard(self, split: SplitName) -> _OpenShard:
        number = sum(shard.split == split for shard in self.closed)
        name = f"{split}-{number:05d}{self.ending}"
        for path in files_of(self.aside, name):
            path.unlink(missing_ok=True)
        return _OpenShard(split, self.aside / name, self.dtype)

    def _as_training(self, shard: Shard) -> Shard:
        if shard.split == "train":
            return shard
        path = self.aside / shard.file
        new = path.with_name(path.name.replace("val-", "train-"))
        for of in (Path, index_path, blocks_path):
            _link(of(path), of(new))
        return shard.model_copy(update={"file": new.name, "split": "train"})


def files_of(folder: Path, shard: str) -> tuple[Path, Path, Path]:
    """The files that a shard consists of."""
    path = folder / shard
    return path, index_path(path), blocks_path(path)


def aside(folder: Path) -> Path:
    """Where a dataset is written before it is whole."""
    return folder.with_name(folder.name + ".partial")


def read_progress(folder: Path) -> dict[str, Any] | None:
    """What a writer of this dataset noted before it was ended, if one was."""
    try:
        return json.loads((aside(folder) / PROGRESS).read_text())
    except (OSError, ValueError):
        return None


def noted_shards(progress: dict[str, Any]) -> list[Shard]:
    """The shards that were finished when this was noted."""
    return [Shard.model_validate(shard) for shard in progress["shards"]]


def as_written(folder: Path, noted: dict[str, Any], shards: Sequence[Shard]) -> Written | None:
    """What was noted; None where it isn't there."""
    extents = {split: Extent(**extent) for split, extent in noted["open"].items()}
    there = aside(folder)
    sizes = {file: 0 for s in shards[: noted["closed"]] for file in files_of(there, s.file)}
    for extent in extents.values():
        sizes[there / extent.file] = extent.tokens * np.dtype(noted["dtype"]).itemsize
        sizes[index_path(there / extent.file)] = extent.documents * 8
    if not all(path.exists() and path.stat().st_size >= size for path, size in sizes.items()):
        return None
    splits = {name: Tally(**tally) for name, tally in noted["splits"].items()}
    return Written(noted["dtype"], noted["closed"], extents, splits, noted["files_bytes"])


def move_into_place(folder: Path) -> None:
    """Put a dataset that is whole, but lies aside, where it belongs; where there is none, nothing
    is done. It is whole when it has a manifest."""
    whole, old = aside(folder), folder.with_name(folder.name + ".old")
    if not (whole / MANIFEST).exists():
        return
    shards = read_manifest(whole).shards
    for path in whole.glob(f"*{NEW}.*"):
        path.replace(path.with_name(path.name.replace(NEW, "")))
    _remove_shards(whole, but={f.name for s in shards for f in files_of(whole, s.file)})
    (whole / PROGRESS).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    whole.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _close(file: IO[bytes]) -> None:
    """Close a file whose contents are on the disk, or not needed: where the disk is full, it can't
    be written to its end."""
    with suppress(OSError):
        file.close()


def _remove_shards(folder: Path, *, but: set[str]) -> None:
    for path in folder.iterdir():
        if path.suffix in (".bin", ".idx", ".crc") and path.name not in but:
            path.unlink()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
