"""A tokenized dataset, opened: what training, evaluation and inspection need to know of one."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_cli.data.shards import (
    MANIFEST,
    DocumentStarts,
    Manifest,
    SplitName,
    TokenStream,
    index_path,
    read_manifest,
)
from pretrain_cli.data.tokenizer import Tokenizer, read_tokenizer
from pretrain_cli.errors import DataError

VERIFIED_WHEN_OPENED = 4 * 2**30
"""Checksums of datasets up to this size are verified at every opening: a second a gigabyte."""


@dataclass(frozen=True)
class Split:
    """The tokens of one split as one long row, and where its documents begin in it."""

    tokens: TokenStream
    documents: DocumentStarts
    bytes: int
    """Of the text, in UTF-8, without document marks."""


@dataclass(frozen=True)
class Dataset:
    """A tokenized dataset, opened and checked."""

    folder: Path
    tokenizer: Tokenizer
    fingerprint: str
    """Changes with any token, with their order and with the tokenizer. Fixes the data order."""
    largest_token: int
    train: Split
    val: Split
    unverified_bytes: int
    """Bytes whose sizes were checked, but not their checksums."""


def open_dataset(folder: Path) -> Dataset:
    """Open a dataset; DataError where a file is missing, cut, altered or swapped."""
    manifest = read_manifest(folder)
    tokenizer = read_tokenizer(folder / "tokenizer.json", name=manifest.tokenizer)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(
            f"{folder / 'tokenizer.json'}: not the tokenizer that made this dataset "
            f"({manifest.tokenizer}); put the right one back, or tokenize again with --force"
        )
    width = np.dtype(manifest.dtype).itemsize
    total = 0
    for shard in manifest.shards:
        for path, size in (
            (folder / shard.file, shard.tokens * width),
            (index_path(folder / shard.file), shard.documents * 8),
        ):
            if not path.is_file():
                raise DataError(f"{path}: missing; tokenize again with --force")
            found = path.stat().st_size
            if found != size:
                raise DataError(
                    f"{path}: {found:,} bytes where {MANIFEST} says {size:,}; "
                    "tokenize again with --force"
                )
            total += size
    if total <= VERIFIED_WHEN_OPENED:
        _verify(folder, manifest)
        total = 0
    return Dataset(
        folder,
        tokenizer,
        fingerprint=manifest.fingerprint,
        largest_token=manifest.largest_token,
        train=_open_split(folder, manifest, "train"),
        val=_open_split(folder, manifest, "val"),
        unverified_bytes=total,
    )


def _verify(folder: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        for path, expected in (
            (folder / shard.file, shard.sha256),
            (index_path(folder / shard.file), shard.index_sha256),
        ):
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise DataError(
                        f"{path}: checksum differs from {MANIFEST}; tokenize again with --force"
                    )


def _open_split(folder: Path, manifest: Manifest, name: SplitName) -> Split:
    shards = [shard for shard in manifest.shards if shard.split == name]
    paths = [folder / shard.file for shard in shards]
    tokens = TokenStream(paths, manifest.dtype)
    starts = [
        np.memmap(index_path(path), dtype="<u8", mode="r")
        if shard.documents
        else np.empty(0, "<u8")
        for path, shard in zip(paths, shards, strict=True)
    ]
    offsets = [end - shard.tokens for end, shard in zip(tokens.ends.tolist(), shards, strict=True)]
    return Split(tokens, DocumentStarts(starts, offsets), manifest.splits[name].bytes)
