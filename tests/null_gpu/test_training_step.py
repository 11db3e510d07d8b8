"""A training step on a GPU: nothing keeps the CPU waiting, few launches, no recompilation.

Arms are (arm, most launches of a step). A figure is what `-s` printed when it was recorded; lower
it when a step needs fewer.
"""

import pytest
import torch

from tests.null_gpu.arms import GEMMA, QWEN, Arm, evaluation, graphs, open_job, steps
from tests.null_gpu.null_gpu import watch

pytestmark = pytest.mark.null_gpu

LAUNCHES = {
    Arm(QWEN): 1277,
    Arm(QWEN, documents=True): 1400,
    Arm(QWEN, optimizer="muon"): 1531,
    Arm(QWEN, micro_steps=2): 2437,
    Arm(QWEN, attention="eager"): 1424,
    Arm(QWEN, attention="sdpa", documents=True): 1291,
    Arm(GEMMA): 1644,
    Arm(GEMMA, documents=True): 1800,
    Arm(GEMMA, optimizer="muon"): 1879,
    Arm(GEMMA, seq_len=8192, documents=True): 1800,
    Arm(GEMMA, attention="eager"): 1780,
    Arm(GEMMA, attention="sdpa"): 1836,
    Arm(QWEN, compile=True): 520,
    Arm(GEMMA, compile=True): 518,
    Arm(QWEN, compile=True, micro_steps=2): 971,
    Arm(QWEN, compile=True, micro_steps=2, cuda_graphs=True): 389,
    Arm(GEMMA, documents=True, compile=True, cuda_graphs=True): 300,
}


each_arm = pytest.mark.parametrize("arm", LAUNCHES, ids=str)
each_compiled_arm = pytest.mark.parametrize(
    "arm", [arm for arm in LAUNCHES if arm.compile], ids=str
)


@each_arm
def test_nothing_waits_for_the_device_between_two_logs(arm, measured):
    seen = measured(arm).seen
    assert not seen.waits, seen.report()


@each_arm
def test_a_step_launches_no_more_than_recorded(arm, measured):
    launches = measured(arm).launches
    print(f"{arm}: {launches} launches a step")
    assert launches <= LAUNCHES[arm]


@each_compiled_arm
def test_nothing_is_compiled_after_the_second_step(arm, measured):
    observed = measured(arm)
    assert observed.graphs_at_first > 0
    assert observed.graphs_later == 0


def test_an_evaluation_compiles_each_kind_of_block_once_at_most(dataset):
    """The forward pass without gradients is a graph of its own. Training then goes on with the code
    that it had."""
    with open_job(Arm(GEMMA, compile=True), dataset) as job:
        steps(job, 2)
        trained = graphs()
        evaluation(job)
        evaluated = graphs()
        assert evaluated - trained <= 2, "one graph for full layers, one for sliding ones"
        with torch._dynamo.config.patch(error_on_recompile=True):
            steps(job, 2)
            evaluation(job)
        assert graphs() == evaluated


def test_cuda_graphs_are_recorded_in_the_first_two_steps(dataset):
    """After that a block is one launch forward and one backward, also after an evaluation."""
    with open_job(Arm(QWEN, compile=True, micro_steps=2, cuda_graphs=True), dataset) as job:
        steps(job, 2)
        evaluation(job)
        with watch() as seen:
            steps(job, 1)
    assert seen.counts["launch graph"] == 2 * 2 * job.plan.model.num_hidden_layers
    assert not [name for name in seen.counts if name.startswith("captured")]


def test_an_evaluation_waits_for_the_device_once(dataset):
    with open_job(Arm(GEMMA), dataset) as job:
        steps(job, 1)
        with watch() as seen:
            evaluation(job)
    waits = [wait for wait in seen.waits if wait.name.startswith("sync")]
    assert len(waits) == 1, seen.report()
