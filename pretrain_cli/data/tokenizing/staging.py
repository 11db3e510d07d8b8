"""Staging folder of an incomplete dataset, `NAME.partial`, and its progress file."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain_cli.data.shards import (
    MANIFEST,
    Shard,
    SplitName,
    TokenType,
    blocks_path,
    index_path,
    read_manifest,
)
from pretrain_cli.data.tokenizing.open_shard import Extent

PARTIAL = ".partial"
PROGRESS = "progress.json"
NEW = ".new"
"""Suffix of a shard that replaces one of the same name once everything is complete."""
REPLACED = "replaced"
"""Name of the replaced dataset while the new one moves into place. It lies inside the new one,
where it cannot collide with other files."""


@dataclass
class Tally:
    """Running count of text."""

    documents: int = 0
    bytes: int = 0
    """Bytes of complete documents."""
    tokens: int = 0


@dataclass(frozen=True)
class WriteState:
    """Content of a dataset at one point of writing."""

    dtype: TokenType
    closed: int
    """Number of finished shards; these never change."""
    open: dict[SplitName, Extent]
    splits: dict[SplitName, Tally]
    files_bytes: int
    """Length of files.jsonl."""


def staging_dir(folder: Path) -> Path:
    """Return the folder in which a dataset is written until it is complete."""
    return folder.with_name(folder.name + PARTIAL)


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


def move_into_place(folder: Path) -> None:
    """Move a complete dataset from its staging folder to its final place. Does nothing if there is
    no staging folder with a manifest; the manifest is what marks a dataset as complete."""
    whole = staging_dir(folder)
    if not (whole / MANIFEST).exists():
        shutil.rmtree(folder / REPLACED, ignore_errors=True)
        return
    shards = read_manifest(whole).shards
    for path in whole.glob(f"*{NEW}.*"):
        path.replace(path.with_name(path.name.replace(NEW, "")))
    remove_shards(whole, but={f.name for s in shards for f in files_of(whole, s.file)})
    (whole / PROGRESS).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(whole / REPLACED, ignore_errors=True)
        folder.rename(whole / REPLACED)
    whole.rename(folder)
    shutil.rmtree(folder / REPLACED, ignore_errors=True)


def files_of(folder: Path, shard: str) -> tuple[Path, Path, Path]:
    """Return the files of a shard."""
    path = folder / shard
    return path, index_path(path), blocks_path(path)


def remove_shards(folder: Path, *, but: set[str]) -> None:
    for path in folder.iterdir():
        if path.suffix in (".bin", ".idx", ".crc") and path.name not in but:
            path.unlink()
