"""Shared slots carry values between a process and those it forks."""

import os

import numpy as np
import pytest

from pretrain_cli.data.shared_slots import LENGTH_BYTES, SharedSlots

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system can't fork")


@pytest.fixture
def slots():
    made = SharedSlots(2, 4096)
    yield made
    made.close()


def test_a_slot_holds_the_last_value_that_fits(slots):
    assert slots.write(0, "first")
    assert slots.write(1, np.arange(9))
    assert not slots.write(0, bytes(5000))
    assert slots.read(0) == "first"
    assert slots.read(1).tolist() == list(range(9))
    assert slots.write(0, b"x")
    assert slots.read(0) == b"x"


def test_the_largest_value_fills_the_slot(slots):
    fitting = next(size for size in range(4096, 0, -1) if slots.write(0, bytes(size)))
    assert 4000 < fitting < 4096 - LENGTH_BYTES
    assert slots.read(0) == bytes(fitting)


def test_a_value_that_was_read_does_not_change_with_the_slot(slots):
    slots.write(0, np.arange(100))
    found = slots.read(0)
    slots.write(0, np.zeros(100))
    assert found.tolist() == list(range(100))


@forks
def test_a_forked_process_reads_and_answers_in_the_same_slot(slots):
    slots.write(1, [1, 2, 3])
    child = os.fork()
    if not child:
        slots.write(1, sum(slots.read(1)))
        os._exit(0)
    os.waitpid(child, 0)
    assert slots.read(1) == 6
