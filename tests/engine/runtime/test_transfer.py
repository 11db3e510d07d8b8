"""Transfers: copies hold the values of the moment at which they were queued."""

import numpy as np
import pytest
import torch

from pretrain_cli.engine.runtime.transfer import completion, to_device, to_host


def test_on_a_cpu_nothing_is_copied_or_waited_for():
    array, tensor = np.arange(6), torch.ones(2)
    assert to_device(array, torch.device("cpu")).data_ptr() == array.ctypes.data
    assert to_host(tensor)() is tensor
    completion(torch.device("cpu"))()


@pytest.mark.gpu
def test_a_copy_to_the_host_is_older_than_later_kernels():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    numbers = to_device(np.arange(2**20), device)
    for _ in range(20):
        read = to_host(numbers)
        numbers += 1
    assert torch.equal(read(), torch.arange(2**20) + 19)
    copy = numbers.to("cpu", non_blocking=True)
    assert copy.is_pinned()
    completion(device)()
    assert torch.equal(copy, torch.arange(2**20) + 20)
