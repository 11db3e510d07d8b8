"""Mapped files: few at once, valid while referenced, refused when changed or beyond a limit."""

import gc
import os
import resource
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from pretrain_cli.data import mapped_files
from pretrain_cli.data.mapped_files import MappedFiles, sizes_and_times
from pretrain_cli.errors import DataError

FILES = 40
LENGTH = 7


@pytest.fixture
def paths(tmp_path):
    """Files of 7 numbers; those of the k-th are k, k + 1, …"""
    paths = [tmp_path / f"{number}.bin" for number in range(FILES)]
    for number, path in enumerate(paths):
        np.arange(number, number + LENGTH, dtype="<u2").tofile(path)
    return paths


@pytest.fixture
def few(monkeypatch):
    """At most 4 mapped files, and none of earlier tests."""
    gc.collect()
    mapped_files._forget_oldest(0)
    monkeypatch.setattr(mapped_files, "MAPPED_AT_MOST", 4)


def opened(paths):
    _, times = sizes_and_times(paths)
    return MappedFiles(paths, np.dtype("<u2"), [LENGTH] * len(paths), modified=times)


def descriptors():
    return len(os.listdir("/dev/fd"))


def test_any_order_of_reading_maps_few_files_at_once(paths, few):
    before = descriptors()
    files = opened(paths)
    for number in np.random.default_rng(0).integers(FILES, size=500).tolist():
        assert files[number].tolist() == list(range(number, number + LENGTH))
        assert descriptors() <= before + 4


def test_the_bound_is_one_for_all_data_of_a_process(paths, few):
    before = descriptors()
    several = [opened(paths[first : first + 10]) for first in range(0, FILES, 10)]
    for number in range(10):
        for first, files in enumerate(several):
            assert files[number][0] == first * 10 + number
        assert descriptors() <= before + 4


def test_an_array_stays_valid_after_its_file_was_unmapped(paths, few):
    files = opened(paths)
    kept = [files[number][1:3] for number in range(FILES)]
    assert len(files.mapped) == 4
    assert [part.tolist() for part in kept] == [[n + 1, n + 2] for n in range(FILES)]


def test_files_are_mapped_at_once_while_there_is_room(paths, few):
    """A dataset of few shards may be replaced while a run reads it."""
    files = opened(paths[:4])
    for path in paths[:4]:
        path.unlink()
    assert [int(files[number][0]) for number in range(4)] == [0, 1, 2, 3]


def test_data_that_is_gone_leaves_its_room_to_other_data(paths, few):
    opened(paths[:4])
    assert len(opened(paths[4:8]).mapped) == 4


def test_an_empty_file_is_not_mapped(tmp_path, few):
    (tmp_path / "empty").touch()
    files = MappedFiles([tmp_path / "empty"], np.dtype("<u8"), [0])
    assert files[0].tolist() == []
    assert files[0].dtype == np.dtype("<u8")


@pytest.mark.parametrize("change", ["replaced", "cut", "gone"])
def test_a_file_that_changed_since_it_was_opened_is_refused(paths, few, change):
    files = opened(paths)
    path = paths[-1]
    if change == "replaced":
        np.full(LENGTH, 9, "<u2").tofile(path)
        os.utime(path, ns=(0, time.time_ns() + 10**9))
    elif change == "cut":
        os.truncate(path, 4)
    else:
        path.unlink()
    with pytest.raises(DataError) as error:
        files[FILES - 1]
    said = "can't be read (No such file" if change == "gone" else "not the file that was there"
    assert str(error.value).startswith(f"{path}: {said}")


def test_a_missing_file_is_refused_when_data_is_opened(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.bin: missing"):
        sizes_and_times([tmp_path / "nowhere.bin"])


def test_threads_read_the_same_files(paths, few):
    files, wrong = opened(paths), []

    def read(seed):
        for number in np.random.default_rng(seed).integers(FILES, size=2000).tolist():
            if files[number][0] != number:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(files.mapped) <= 4 + len(threads)


# --- limits of the system ------------------------------------------------------------------------


def test_a_low_limit_on_open_files_leaves_most_of_it_to_others(paths, few, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (8, 8))
    before = descriptors()
    files = opened(paths)
    for number in range(FILES):
        assert files[number][0] == number
        assert descriptors() <= before + 2


AT_THE_LIMIT = """
import os, resource, sys
import numpy as np
from pretrain_cli.data.mapped_files import MappedFiles
from pretrain_cli.errors import DataError

kind, path, length = sys.argv[1:]
if kind == "files":
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        os.close(held[0])  # the file can be opened, but not mapped as well
else:
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
try:
    MappedFiles([path], np.dtype("<u2"), [int(length)])
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("kind", "length", "said"),
    [
        ("files", 7, "can't be read (Too many open files); raise the limit on open files with"),
        ("memory", 2**33, "can't be read (Cannot allocate memory); raise the limit on memory"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="limits differ elsewhere")
def test_a_limit_of_the_system_is_one_line(tmp_path, kind, length, said):
    path = tmp_path / "large.bin"
    path.touch()
    os.truncate(path, length * 2)  # sparse
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_LIMIT, kind, path, str(length)],
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    assert done.stdout.startswith(f"{path}: {said}")
