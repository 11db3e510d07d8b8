"""Files of a corpus: expands the given names, recursively and in a fixed order.

A name is a file, a folder, a pattern (`'corpus/**/*.txt'`), a stream such as a FIFO, `-` for
standard input, or a dataset on the hub (`hf:OWNER/NAME`). Files are recorded by names that do not
depend on the location of the corpus, so a corpus that was moved, or has grown, is recognized.
"""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

from pretrain_cli.errors import DataError

STANDARD_INPUT = "-"
HUB = "hf:"
"""Beginning of the name of a dataset on the hub, and of the location of each of its files."""
WRITTEN_HERE = (
    {"dataset.json", "tokenizer.json"},
    {"files.jsonl", "tokenizer.json"},
    {"run.yaml", "metrics.jsonl"},
)
"""Files that mark a dataset, an unfinished dataset or a run. Such folders are not searched for
text."""
ARCHIVES = (".tar", ".zip", ".7z", ".rar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file to read. Kept small, since a corpus may have millions of files."""

    location: str
    name: str
    """Name of the given folder, and the path inside it."""
    source: str
    """Source under which the file is counted: the given folder or file, plus the first subfolder,
    if any."""
    size: int = 0
    """Bytes on disk; 0 for a stream."""
    modified: int = 0
    """Modification time in nanoseconds; 0 for a stream."""
    is_stream: bool = False

    @property
    def path(self) -> Path:
        return Path(self.location)

    @property
    def is_remote(self) -> bool:
        """True for a file on the hub, which is read with `hub.HubFile`."""
        return self.location.startswith(HUB)


@dataclass
class Corpus:
    """Files to read, in order, and files left out, with the reason."""

    files: list[TextFile]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def has_streams(self) -> bool:
        """True if a part of the corpus can be read only once."""
        return any(file.is_stream for file in self.files)


def find_corpus(
    names: Sequence[str], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Corpus:
    """Return the files under these names. Folders are searched recursively, without hidden files.

    `include` and `exclude` are patterns for file names or, if they contain a slash, for paths
    inside the folder. They filter what folders and patterns yield.
    """
    corpus = Corpus([])
    for name in names:
        if name == STANDARD_INPUT:
            corpus.files.append(TextFile("/dev/stdin", name, name, is_stream=True))
        elif name.startswith(HUB):
            corpus.files += _on_the_hub(name, include, exclude)
        elif os.path.isdir(name):
            corpus.files += _below(Path(name), include, exclude, corpus.left_out)
        elif os.path.exists(name):
            if name.lower().endswith(ARCHIVES):
                raise DataError(f"{name}: an archive; unpack it, and give its folder")
            corpus.files.append(_file(Path(name), Path(name).name, Path(name).name))
        elif glob.has_magic(name):
            corpus.files += _matching(name, include, exclude, corpus.left_out)
        else:
            raise DataError(f"{name}: no such file or folder")
    if not corpus.files:
        chosen = " that --include and --exclude leave" if include or exclude else ""
        because = next((f" ({path}: {why})" for path, why in corpus.left_out.items()), "")
        raise DataError(
            f"{', '.join(names)}: no files in it{chosen}{because}; give a folder of text"
        )
    seen = Counter(file.name for file in corpus.files)
    corpus.files = [
        replace(file, name=legible(file.path.as_posix())) if seen[file.name] > 1 else file
        for file in corpus.files
    ]
    corpus.left_out = {legible(path): why for path, why in corpus.left_out.items()}
    return corpus


def legible(name: str) -> str:
    """Return a file name as text. Bytes that are not UTF-8 appear as \\xe9."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _below(
    root: Path, include: Sequence[str], exclude: Sequence[str], left_out: dict[str, str]
) -> Iterator[TextFile]:
    def not_listed(error: OSError) -> None:
        left_out[str(error.filename)] = f"can't be read ({error.strerror})"

    top = root.resolve().name
    for folder, subfolders, names in os.walk(root, onerror=not_listed):
        if any(marks <= set(names) for marks in WRITTEN_HERE):
            left_out[folder] = "a dataset or a run, not text"
            subfolders.clear()
            continue
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and name != "__pycache__"
        )
        for name in subfolders:  # not followed, since links can form a cycle
            if os.path.islink(path := os.path.join(folder, name)):
                left_out[path] = "a link to a folder"
        for name in sorted(names):
            path = Path(folder, name)
            inside = path.relative_to(root)
            if name.startswith(".") or not _is_chosen(inside, include, exclude):
                continue
            if why := _why_not(path):
                left_out[str(path)] = why
            else:
                source = f"{top}/{inside.parts[0]}" if len(inside.parts) > 1 else top
                yield _file(path, f"{top}/{inside.as_posix()}", source)


def _matching(
    pattern: str, include: Sequence[str], exclude: Sequence[str], left_out: dict[str, str]
) -> Iterator[TextFile]:
    fixed = Path(*_until_magic(Path(pattern).parts))
    found = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    files = [path for path in found if not path.is_dir()]
    if not files:
        raise DataError(f"{pattern}: no file matches it")
    for path in files:
        inside = path.relative_to(fixed)
        if not _is_chosen(inside, include, exclude):
            continue
        if why := _why_not(path):
            left_out[str(path)] = why
        else:
            yield _file(path, f"{fixed.resolve().name}/{inside.as_posix()}", pattern)


def _on_the_hub(asked: str, include: Sequence[str], exclude: Sequence[str]) -> Iterator[TextFile]:
    from pretrain_cli.data.corpus.hub import hub_files

    for file in hub_files(asked):
        inside = Path(file.location.partition("@")[2].partition("/")[2])
        if _is_chosen(inside, include, exclude):
            yield file


def _why_not(path: Path) -> str | None:
    """Return the reason for leaving a file out; None if it is to be read."""
    if not path.is_file():
        return "not a regular file"
    return "an archive" if path.name.lower().endswith(ARCHIVES) else None


def _until_magic(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


def _is_chosen(inside: Path, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(pattern: str) -> bool:
        return fnmatch(inside.as_posix() if "/" in pattern else inside.name, pattern)

    return (not include or any(map(matches, include))) and not any(map(matches, exclude))


def _file(path: Path, name: str, source: str) -> TextFile:
    name, source = legible(name), sys.intern(legible(source))
    status = path.stat()
    if not path.is_file():
        return TextFile(str(path), name, source, is_stream=True)
    return TextFile(str(path), name, source, status.st_size, status.st_mtime_ns)
