"""Search for a micro-batch, with fake measurements: the sizes that it tries, and its result."""

import dataclasses

import pytest
import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.search import LONGEST, MicroBatchSearch
from pretrain_cli.engine.benchmark.timing import Round
from pretrain_cli.engine.benchmark.workload import Repeats, Workload
from pretrain_cli.engine.runtime.peak_flops import Peak
from pretrain_cli.model.presets import preset

WORKLOAD = Workload(
    name="tiny", model=preset("qwen3-tiny"), seq_len=64, micro_batch_size=1, device="cpu"
)
SPEED = {
    "dtype": {"asked": "float32", "in_force": "float32"},
    "float32_matmul": {"asked": "highest", "in_force": "highest"},
}


def machine(seconds_of, bytes_of, out_of_memory=None):
    """Return a fake measurement, and the list of sizes measured, in order."""
    tried = []

    def start(name, speed, folder, *arguments):
        if name == "measure_peak":
            return Peak(1e12, "made up", 1e12)
        arm, repeats = arguments
        size = arm.workload.micro_batch_size
        tried.append(size)
        if out_of_memory is not None and size >= out_of_memory:
            raise torch.OutOfMemoryError
        return Round(
            tokens=64 * size,
            times=[seconds_of(size)] * repeats.steps,
            warmup=[seconds_of(size)],
            losses=[5.0, 4.0],
            gradient_norms=[1.0, 1.0],
            peak_memory=bytes_of(size),
            warmup_peak_memory=bytes_of(size),
            speed=SPEED,
        )

    return start, tried


def search(start, room):
    return MicroBatchSearch(
        WORKLOAD, SpeedConfig(), Repeats(rounds=2, steps=3, warmup=1), room=room, start=start
    )


def estimated(size):
    return search(None, 0).estimate(size)


def test_the_search_finds_a_fastest_size_between_powers_of_two():
    """Simulate a machine that is fastest with 6 samples, and slower with more."""

    def seconds_of(size):
        return 0.1 + 0.1 * size + 0.02 * max(0, size - 6) ** 2

    start, tried = machine(seconds_of, estimated)
    found = search(start, estimated(40))
    list(found.go())
    answer = found.found()
    assert answer.fastest == 6
    assert answer.largest == 40
    assert tried[:5] == [1, 2, 4, 8, 16]
    assert tried.count(6) == 2  # in both rounds
    assert tried[-1] == 40
    assert answer.tokens_per_second[6] == pytest.approx(64 * 6 / 0.7)
    assert "41 would take about" in answer.limit
    written = found.answers()["micro_batch"]
    assert (written["fastest"], written["largest"], written["room"]) == (6, 40, estimated(40))
    order = [result.workload["micro_batch_size"] for result in found.results()]
    assert order == sorted(order)


def test_sizes_estimated_not_to_fit_are_not_tried():
    start, tried = machine(lambda size: 0.1, estimated)  # tokens/s grow with the size
    found = search(start, estimated(11) + 1)
    list(found.go())
    assert max(tried) == 11
    assert found.found().largest == found.found().fastest == 11


def test_measured_peaks_correct_a_wrong_memory_estimate():
    """Simulate peaks of 1.2 times the estimate: 200 samples fit by the estimate only."""
    start, tried = machine(lambda size: 0.1 * size, lambda size: int(1.2 * estimated(size)))
    room = estimated(200)
    found = search(start, room)
    list(found.go())
    largest = found.found().largest
    assert max(tried) == largest < 200
    assert 1.2 * estimated(largest) <= room < 1.2 * estimated(largest + 1)


def test_the_largest_size_is_below_one_that_ran_out_of_memory():
    start, _ = machine(lambda size: 0.1 * size, estimated, out_of_memory=30)
    found = search(start, estimated(40))
    list(found.go())
    assert 22 <= found.found().largest < 30
    assert "out of memory" in found.failures.values()
    failed = [result for result in found.results() if result.kind == "not run"]
    assert failed


def test_a_step_that_would_take_too_long_is_not_tried():
    start, tried = machine(lambda size: 3.0 * size, estimated)
    found = search(start, estimated(1000))
    list(found.go())
    assert max(tried) == LONGEST // 3
    assert "and 1000 should fit" in found.found().limit


def test_without_room_for_one_sample_the_search_tries_nothing():
    start, tried = machine(lambda size: 1.0, estimated)
    found = search(start, estimated(1) - 1)
    list(found.go())
    assert tried == []
    assert found.found() is None
    assert found.answers() == {"micro_batch": None}


def test_the_memory_estimate_uses_the_workloads_length():
    workload = dataclasses.replace(WORKLOAD, seq_len=256)
    longer = MicroBatchSearch(workload, SpeedConfig(), Repeats(rounds=1, steps=1, warmup=1), room=0)
    assert longer.estimate(2) == estimated(8)  # `blocks`: only the token count matters
