"""Peak FLOP/s of a device: from the table by the device's name, and measured."""

import pytest
import torch

from pretrain_cli.engine.runtime.gpu_specs import stated_for
from pretrain_cli.engine.runtime.peak_flops import find_peak


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_the_stated_peak_is_that_of_the_exact_gpu_name_or_none(name, teraflops):
    stated = stated_for(name)
    assert (stated and stated.flops) == (teraflops and teraflops * 1e12)


def test_an_unknown_device_gets_its_measured_peak():
    before = torch.get_rng_state()
    peak = find_peak(torch.device("cpu"), torch.float32, seconds=0.05)
    assert peak.flops == peak.measured
    assert 1e9 < peak.flops < 1e14  # between one slow core and any machine
    assert peak.source.startswith("measured, ")
    assert peak.source.endswith("³ matrix product in float32")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_measured_peak_is_below_its_stated_peak():
    peak = find_peak(torch.device("cuda", 0), torch.bfloat16, seconds=0.2)
    if peak.source.startswith("stated"):
        assert 0.4 * peak.flops < peak.measured < 1.02 * peak.flops
    else:
        assert peak.flops == peak.measured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_measuring_the_peak_leaves_no_mark_on_the_peak_of_memory():
    device = torch.device("cuda", 0)
    find_peak(device, torch.bfloat16, seconds=0.05)  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated(device)
    find_peak(device, torch.bfloat16, seconds=0.06)
    assert torch.cuda.max_memory_allocated(device) == before == torch.cuda.memory_allocated(device)
