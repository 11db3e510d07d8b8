"""Readers of text: files and folders in, one document at a time out.

A document is a file, or one line of a `.jsonl` file. Text is UTF-8, taken as it is: no newline is
translated, nothing is stripped. Files that are not UTF-8 are skipped, and counted.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pretrain_cli.errors import DataError

WRITTEN_HERE = ({"dataset.json", "tokenizer.json"}, {"run.yaml", "metrics.jsonl"})
"""Files that mark a tokenized dataset or a run: never part of a corpus that is searched."""


@dataclass(frozen=True)
class Document:
    text: str
    size: int
    """Bytes of the text in UTF-8."""


@dataclass
class Corpus:
    """Files to read, in a fixed order, and what was skipped of them while reading."""

    files: list[Path]
    names: list[str]
    """The files as named relative to what was asked for: the same wherever the corpus lies."""
    text_key: str
    skipped: list[Path] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def digest(self) -> str:
        """Changes when a file is added, removed or touched: of names, sizes and times."""
        seen = hashlib.sha256(self.text_key.encode())
        for name, path in zip(self.names, self.files, strict=True):
            stat = path.stat()
            seen.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return seen.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Every document in order. Raises DataError for a broken JSON line."""
        self.skipped.clear()
        for path in self.files:
            texts = _json_lines(path, self.text_key) if path.suffix == ".jsonl" else _whole(path)
            try:
                for text in texts:
                    if text:
                        yield Document(text, len(text.encode()))
            except UnicodeDecodeError:
                self.skipped.append(path)


def find_corpus(paths: Iterable[Path], text_key: str, suffix: str = "") -> Corpus:
    """The files under these paths, folders searched to the bottom, hidden ones left out; where a
    suffix is given, only the files that end so."""
    files: list[Path] = []
    names: list[str] = []
    for root in paths:
        if root.is_dir():
            for path in _files_below(root, suffix):
                files.append(path)
                names.append(path.relative_to(root).as_posix())
        elif root.is_file():
            files.append(root)
            names.append(root.name)
        elif root.exists():
            raise DataError(f"{root}: not a regular file or a folder; give files of text")
        else:
            raise DataError(f"{root}: no such file or folder")
    if not files:
        raise DataError(f"{', '.join(map(str, paths))}: no files in it; give a folder of text")
    return Corpus(files, names, text_key)


def _files_below(root: Path, suffix: str) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        if any(marks <= set(names) for marks in WRITTEN_HERE):
            subfolders.clear()
            continue
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and name != "__pycache__"
        )
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and name.endswith(suffix) and path.is_file():
                yield path


def _whole(path: Path) -> Iterator[str]:
    yield path.read_bytes().decode("utf-8")


def _json_lines(path: Path, text_key: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise DataError(f"{path}:{number}: not UTF-8; mend or remove the line") from None
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not a JSON line ({error.msg} at column {error.colno}); "
                    "mend or remove it"
                ) from None
            if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
                keys = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
                raise DataError(
                    f"{path}:{number}: no text under '{text_key}' (it has {keys}); "
                    "name the key with --text-key"
                )
            if not _is_unicode(row[text_key]):
                raise DataError(
                    f"{path}:{number}: its text has half of a surrogate pair (\\ud800 to \\udfff); "
                    "mend or remove the line"
                )
            yield row[text_key]


def _is_unicode(text: str) -> bool:
    """JSON can escape a lone surrogate, which is no character and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
