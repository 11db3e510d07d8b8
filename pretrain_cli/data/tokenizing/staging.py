"""Staging folder of a dataset in the making, and its move into place."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pretrain_cli.data.shards import (
    MANIFEST,
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
