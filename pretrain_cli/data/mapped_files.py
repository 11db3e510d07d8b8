"""Arrays in files, mapped into memory. A process maps at most 256 files at once.

Each map holds a file descriptor, of which a process often may have 1,024, and a dataset may have
100,000 files. Files are mapped at once while there is room, and later when they are read: the
oldest map makes room for a new one. Reading a mapped file is a lookup in a dict, without a lock or
a change of order, so a file in constant use is mapped again once in 256 such changes.
"""

import mmap
import os
import resource
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from pretrain_cli.errors import DataError
from pretrain_cli.files import LIMITS

MAPPED_AT_MOST = 256
SHARE_OF_LIMIT = 4
"""Divisor of the limit on open files (`ulimit -n`): maps use no more than this share of it."""
_mapped: "deque[tuple[weakref.ref[MappedFiles], int]]" = deque()
"""Maps of this process, oldest first."""


class MappedFiles:
    """Arrays of one type, one a file. An array that is still referenced stays valid when its file
    is no longer mapped here."""

    def __init__(
        self,
        paths: Sequence[Path | str],
        dtype: np.dtype,
        lengths: Sequence[int],
        *,
        header: int = 0,
        modified: np.ndarray | None = None,
    ) -> None:
        """Arrays have these `lengths` and start after `header` bytes. A file with another size or,
        if given, another modification time is refused when it is mapped."""
        self.paths = [os.fspath(path) for path in paths]
        self.dtype, self.lengths, self.header = dtype, lengths, header
        self.modified = modified
        self.mapped: dict[int, np.ndarray] = {}
        """Arrays of the mapped files, by their number."""
        room = _room()
        if len(_mapped) + len(self) > room:
            _forget_unused()
        for number in range(min(len(self), room - len(_mapped))):
            self[number]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> np.ndarray:
        """Return the array of a file. Raises DataError if the file changed, or a limit of the
        system is reached."""
        array = self.mapped.get(number)
        return self._map(number) if array is None else array

    def _map(self, number: int) -> np.ndarray:
        if not self.lengths[number]:
            return np.empty(0, self.dtype)
        _forget_oldest(_room() - 1)
        try:
            array = self._open(number)
        except OSError as error:
            if error.errno in LIMITS and _mapped:
                _forget_oldest(0)
                return self._map(number)
            advice = LIMITS.get(error.errno or 0, "make it available again, and start again")
            raise DataError(
                f"{self.paths[number]}: can't be read ({error.strerror}); {advice}"
            ) from None
        self.mapped[number] = array
        _mapped.append((weakref.ref(self), number))
        return array

    def _open(self, number: int) -> np.ndarray:
        path, length = self.paths[number], self.lengths[number]
        size = self.header + length * self.dtype.itemsize
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(file)
            same_time = self.modified is None or status.st_mtime_ns == self.modified[number]
            if status.st_size != size or not same_time:
                raise DataError(
                    f"{path}: not the file that was there when the data was opened; start again, "
                    "and leave data that is in use alone"
                )
            mapped = mmap.mmap(file, size, access=mmap.ACCESS_READ)
        finally:
            os.close(file)
        return np.frombuffer(mapped, self.dtype, length, self.header)


def _room() -> int:
    """Return the number of files that this process may map at once."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return MAPPED_AT_MOST
    return max(1, min(MAPPED_AT_MOST, limit // SHARE_OF_LIMIT))


def _forget_oldest(keep: int) -> None:
    """Forget the oldest maps of this process but `keep`."""
    with suppress(IndexError):  # another thread may have forgotten them
        while len(_mapped) > keep:
            owner, number = _mapped.popleft()
            if (files := owner()) is not None:
                files.mapped.pop(number, None)


def _forget_unused() -> None:
    """Forget the maps of objects that are gone."""
    with suppress(IndexError):
        for _ in range(len(_mapped)):
            entry = _mapped.popleft()
            if entry[0]() is not None:
                _mapped.append(entry)


def sizes_and_times(paths: Sequence[Path | str]) -> tuple[np.ndarray, np.ndarray]:
    """Return sizes in bytes and modification times in ns. -> two (n,) int64. Raises DataError for a
    file that is not there."""
    sizes, times = np.empty((2, len(paths)), np.int64)
    for number, path in enumerate(paths):
        try:
            status = os.stat(path)
        except OSError as error:
            why = "missing" if isinstance(error, FileNotFoundError) else error.strerror
            raise DataError(f"{path}: {why}") from None
        sizes[number], times[number] = status.st_size, status.st_mtime_ns
    return sizes, times
