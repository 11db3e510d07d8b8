"""The null GPU itself: PyTorch's view of it, and what its counters catch."""

import pytest
import torch

from tests.null_gpu import null_gpu
from tests.null_gpu.null_gpu import compiled_kernels, watch

pytestmark = pytest.mark.null_gpu


def test_pytorch_sees_one_h100_with_all_of_its_memory():
    assert torch.cuda.device_count() == 1
    assert torch.cuda.get_device_capability() == (9, 0)
    assert torch.cuda.get_device_properties(0).shared_memory_per_block_optin == 232_448
    free, total = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved()  # what earlier tests of this process left in its cache
    assert 0.9 * total < free < total == 85e9


def test_launches_are_counted_by_kind():
    x = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    x @ x  # cuBLAS allocates its workspace
    with watch() as seen:
        (x @ x).add_(1).copy_(x)
    assert seen.counts["cublasGemmEx"] == 1
    assert seen.counts["launch ATen"] == 1
    assert seen.counts["copy on device"] == 1
    assert seen.launches == 3
    assert not seen.waits


def test_a_wait_is_reported_with_the_line_that_caused_it():
    x = torch.zeros(4, device="cuda")
    with watch() as seen:
        x[0].item()  # this line
    assert [wait.name for wait in seen.waits] == ["sync stream"]
    assert "x[0].item()  # this line" in seen.report()
    assert "test_null_gpu.py" in seen.report()


@pytest.mark.parametrize("pinned", [True, False])
def test_only_copies_of_pinned_memory_keep_nobody_waiting(pinned):
    x = torch.zeros(1000, pin_memory=pinned)
    with watch() as seen:
        on_device = x.to("cuda", non_blocking=True)
    assert [w.name for w in seen.waits] == ([] if pinned else ["copy to device, pageable"])
    with watch() as seen:
        x.copy_(on_device, non_blocking=True)
    assert [w.name for w in seen.waits] == ([] if pinned else ["copy to host, pageable"])


def test_an_indexed_assignment_of_a_number_waits():
    """The CPU must not write `tensor[i] = number` in a step: it copies the number."""
    x = torch.zeros(4, device="cuda")
    index = torch.tensor(2, device="cuda")
    with watch() as seen:
        x[index] = 1.0
    assert seen.waits


def test_memory_runs_out_and_is_given_back():
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    x = torch.empty(30_000_000_000, dtype=torch.uint8, device="cuda")
    assert torch.cuda.mem_get_info()[0] < before - 29e9
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(80_000_000_000, dtype=torch.uint8, device="cuda")
    del x
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] == before


def test_triton_compiles_for_the_device_and_its_launch_is_counted():
    from torch._inductor.utils import fresh_cache

    x = torch.zeros(1000, device="cuda")
    with fresh_cache(), compiled_kernels() as kernels:
        doubled = torch.compile(lambda x: x.exp() * 2)
        doubled(x)
        with watch() as seen:
            doubled(x)
    assert kernels
    assert all(k.registers > 0 and k.stack == 0 for k in kernels)
    assert seen.counts["launch Triton"] == 1 == seen.launches


def test_a_captured_graph_is_one_launch_and_must_not_wait():
    x = torch.zeros(64, 64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with watch() as seen, torch.cuda.graph(graph):
        x.add_(1).mul_(2)
    assert seen.counts["captured launch ATen"] == 2
    assert not seen.launches
    with watch() as seen:
        graph.replay()
    assert seen.counts["launch graph"] == 1 == seen.launches
    with pytest.raises(RuntimeError, match="CUDA error"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()


def test_a_reset_counter_is_not_listed():
    torch.zeros(4, device="cuda").add_(1)
    assert null_gpu.counts()["launch ATen"] >= 1
    null_gpu.reset()
    assert not null_gpu.counts()
