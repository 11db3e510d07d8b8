"""Mapping in forked processes: in order, with their errors, and never outliving their parent."""

import os
import signal
import subprocess
import sys
import time
from itertools import count, islice

import pytest

from pretrain_cli.data.parallel import CAN_FORK, cores, map_in_order
from pretrain_cli.errors import DataError

forks = pytest.mark.skipif(not CAN_FORK, reason="processes are forked on Linux only")


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(workers):
    def work(number):
        time.sleep(0.002 * (number % 3))
        return number, os.getpid()

    results = list(map_in_order(work, range(40), workers))
    assert [number for number, _ in results] == list(range(40))
    processes = {process for _, process in results}
    assert len(processes) == (workers if CAN_FORK else 1)
    assert (os.getpid() in processes) == (workers == 1 or not CAN_FORK)


def test_no_items_give_no_results():
    assert list(map_in_order(str, [], 3)) == []


def test_items_are_taken_as_results_are(monkeypatch):
    taken = []

    def items():
        for number in count():
            taken.append(number)
            yield number

    assert list(islice(map_in_order(lambda number: -number, items(), 2), 5)) == [0, -1, -2, -3, -4]
    assert len(taken) < 12


def test_an_error_in_a_process_is_raised_here():
    def work(number):
        if number == 7:
            raise DataError("file 7: wrong")
        return number

    results = map_in_order(work, range(20), 3)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(DataError, match=r"^file 7: wrong$"):
        next(results)


@forks
def test_a_process_killed_from_outside_is_one_line():
    def work(number):
        if number == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(DataError, match="a process was ended from outside, perhaps because memory"):
        list(map_in_order(work, range(20), 3))


ENDLESS = """
import os, time
from itertools import count
from pretrain_cli.data.parallel import map_in_order

def work(number):
    time.sleep(0.05)
    return os.getpid()

for process in map_in_order(work, count(), 3):
    print(process, flush=True)
"""


def runs(process):
    """Return whether a process exists and has not ended; one that nobody waited for is a Z."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@forks
def test_processes_end_with_their_parent_even_if_it_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = {int(parent.stdout.readline()) for _ in range(6)}
    assert len(workers) == 3
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while any(map(runs, workers)):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_process_has_at_least_one_core():
    assert 1 <= cores() <= (os.cpu_count() or 1)


def test_cores_are_counted_on_systems_without_cpu_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cores() == os.cpu_count()
