"""Merge: the parts of a dataset become one, by hard links.

The manifest is written last. A merge that was killed leaves its parts as they were and no dataset;
it is run again.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain_cli.data.dataset import find_damage
from pretrain_cli.data.shards import (
    FILES,
    MANIFEST,
    PARTIAL,
    Amount,
    Manifest,
    Shard,
    read_manifest,
)
from pretrain_cli.errors import DataError
from pretrain_cli.files import flush, sha256_of, write_whole

MARKER = ".merging"
"""File in a folder that a merge began to fill."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SHARD_FILE = re.compile(r"(train|val)-[0-9]{5,}\.(bin|idx|crc)(\.partial)?")


@dataclass(frozen=True)
class Merged:
    """Result of a merge."""

    folder: Path
    manifest: Manifest
    was_there: bool
    """True if the same parts had been merged; nothing was done."""


@dataclass(frozen=True)
class _Part:
    folder: Path
    manifest: Manifest
    number: int
    of: int
    listing: str


def merge(folders: Sequence[Path], out: Path | None = None, *, force: bool = False) -> Merged:
    """Merge all parts of a dataset into `out`, by default the folder that holds them. Raises
    DataError if they don't belong together, or one is missing, given twice or damaged."""
    parts = sorted(map(_open_part, folders), key=lambda part: part.number)
    _check_together(parts)
    for part in parts:
        for damage in find_damage(part.folder, part.manifest, thoroughly=False):
            raise DataError(f"{damage}; tokenize this part again with --force")
    out = parts[0].folder.parent if out is None else out
    names = _names(parts)
    if (out / MANIFEST).exists():
        existing = read_manifest(out)
        merged = _merged(parts, names, existing.files_sha256)
        if existing == merged and not any(find_damage(out, existing, thoroughly=False)):
            (out / MARKER).unlink(missing_ok=True)
            return Merged(out, existing, was_there=True)
        if not force:
            raise DataError(
                f"{out}: holds another dataset; replace it with --force, or choose another folder "
                "with --out"
            )
    _claim(out, parts)
    for part in parts:
        for shard in part.manifest.shards:
            new = names[part.number, shard.file]
            for old, name in zip(_files_of(shard), _files_of(new), strict=True):
                _place(part.folder / old, out / name)
    for name in TOKENIZER_FILES:
        _place(parts[0].folder / name, out / name)
    _join_files(parts, out / FILES)
    merged = _merged(parts, names, sha256_of(out / FILES))
    kept = {name for shard in merged.shards for name in _files_of(shard)}
    for path in out.iterdir():
        if SHARD_FILE.fullmatch(path.name) and path.name not in kept:
            path.unlink()
    write_whole(out / MANIFEST, merged.model_dump_json(indent=2) + "\n")
    (out / MARKER).unlink(missing_ok=True)
    return Merged(out, merged, was_there=False)


# --- what belongs together -----------------------------------------------------------------------


def _open_part(folder: Path) -> _Part:
    if folder.name.endswith(PARTIAL):
        raise DataError(f"{folder}: this part is not finished; run it again with its --part")
    manifest = read_manifest(folder)
    made = manifest.options.get("part")
    if made is None:
        raise DataError(f"{folder}: not a part; --merge takes what 'tokenize --part' made")
    return _Part(folder, manifest, **made)


def _check_together(parts: Sequence[_Part]) -> None:
    """Raise DataError unless these are all parts of one corpus, made in one way."""
    if not parts:
        raise DataError("--merge: no parts given; name their folders, such as data/corpus/part-*")
    first = parts[0]
    for part, before in zip(parts, [first, *parts], strict=False):
        where = f"{part.folder}: part {part.number} of {part.of}"
        if part.of != first.of:
            raise DataError(
                f"{where}, and {first.folder} is one of {first.of}; give the parts of one count"
            )
        if part is not first and part.number == before.number:
            raise DataError(f"{where} again, after {before.folder}; give each part once")
        if part.listing != first.listing:
            raise DataError(
                f"{where} was dealt from another list of files than {first.folder}: some were "
                "added, removed or changed in between; tokenize the parts again, from the same "
                "files"
            )
        if other := _differences(part.manifest, first.manifest):
            raise DataError(
                f"{where} was made with another {', '.join(other)} than {first.folder}; tokenize "
                "it again in the same way"
            )
    present = {part.number for part in parts}
    missing = [number for number in range(1, first.of + 1) if number not in present]
    if missing:
        listed = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise DataError(
            f"{first.folder.parent}: {len(missing)} of {first.of} parts missing ({listed}); run "
            f"--part {missing[0]}/{first.of}"
        )


def _differences(one: Manifest, other: Manifest) -> list[str]:
    """Return the names of the options, and of the facts about the tokenizer, that differ."""
    names = ("dtype", "beginning_of_document", "end_of_document", "format_version")
    found = [name for name in names if getattr(one, name) != getattr(other, name)]
    keys = sorted({*one.options, *other.options} - {"part", "tokenizer"})
    found += [key for key in keys if one.options.get(key) != other.options.get(key)]
    if one.tokenizer_fingerprint != other.tokenizer_fingerprint:
        found.insert(0, "tokenizer")
    return [name.replace("_", " ") for name in found]


# --- the merged dataset --------------------------------------------------------------------------


def _names(parts: Sequence[_Part]) -> dict[tuple[int, str], Shard]:
    """Return each shard under its new name, by part and old name: numbered through all parts."""
    total = sum(len(part.manifest.shards) for part in parts)
    digits = max(5, len(str(total)))
    counts: Counter[str] = Counter()
    names: dict[tuple[int, str], Shard] = {}
    for part in parts:
        for shard in part.manifest.shards:
            name = f"{shard.split}-{counts[shard.split]:0{digits}d}.bin"
            counts[shard.split] += 1
            names[part.number, shard.file] = shard.model_copy(update={"file": name})
    return names


def _merged(
    parts: Sequence[_Part], names: dict[tuple[int, str], Shard], files_sha256: str
) -> Manifest:
    """Return the manifest of all parts together."""
    manifests = [part.manifest for part in parts]
    first = manifests[0]
    sources: dict[str, Amount] = {}
    remarks: Counter[str] = Counter()
    for manifest in manifests:
        for name, amount in manifest.sources.items():
            sources[name] = sources.get(name, Amount()) + amount
        remarks.update(manifest.remarks)
    return first.model_copy(
        update={
            "paths": list(dict.fromkeys(path for each in manifests for path in each.paths)),
            "options": {key: value for key, value in first.options.items() if key != "part"},
            "splits": {
                split: sum((each.splits[split] for each in manifests), Amount())
                for split in first.splits
            },
            "sources": sources,
            "inexact_cuts": sum(each.inexact_cuts for each in manifests),
            "remarks": dict(remarks),
            "files_sha256": files_sha256,
            "shards": sorted(names.values(), key=lambda shard: shard.split),
        }
    )


def _files_of(shard: Shard) -> tuple[str, str, str]:
    return shard.file, shard.index, shard.blocks


def _claim(out: Path, parts: Sequence[_Part]) -> None:
    """Make the folder, or take one that holds the parts, an older dataset or an unfinished merge.
    An older dataset ends here."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: not a folder; choose another one with --out")
    known = (out / MANIFEST).exists() or (out / MARKER).exists()
    holds_parts = any(part.folder.resolve().parent == out.resolve() for part in parts)
    if out.is_dir() and any(out.iterdir()) and not known and not holds_parts:
        raise DataError(f"{out}: exists and is not a dataset; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    (out / MANIFEST).unlink(missing_ok=True)


def _place(source: Path, target: Path) -> None:
    """Give a file a second name by a hard link, or copy it where the file system has none."""
    with suppress(FileNotFoundError):
        if source.samefile(target):
            return
    staging = target.with_name(f"{target.name}{PARTIAL}")
    staging.unlink(missing_ok=True)
    try:
        os.link(source, staging)
    except OSError:
        shutil.copyfile(source, staging)
        with staging.open("rb+") as file:
            flush(file)
    staging.replace(target)


def _join_files(parts: Sequence[_Part], target: Path) -> None:
    staging = target.with_name(f"{target.name}{PARTIAL}")
    with staging.open("wb") as joined:
        for part in parts:
            with (part.folder / FILES).open("rb") as file:
                shutil.copyfileobj(file, joined, 2**20)
        flush(joined)
    staging.replace(target)
