"""Triton kernels of a training step, compiled by ptxas for an H100: they fit, and few spill."""

import pytest

from tests.null_gpu.arms import GEMMA, QWEN, Arm

pytestmark = pytest.mark.null_gpu

SHARED_MEMORY = 232_448
"""Bytes of shared memory that a block of an H100 can have."""
STACK = {
    Arm(QWEN, compile=True): 80,
    Arm(GEMMA, compile=True): 0,
    Arm(QWEN, attention="flex", documents=True): 208,
}
"""Most bytes of stack of a thread that a kernel of the arm may use: registers that spilled. Figures
of torch 2.14.1; `-s` prints them."""
each_arm = pytest.mark.parametrize("arm", STACK, ids=str)


@each_arm
def test_every_kernel_fits_shared_memory(arm, measured):
    kernels = measured(arm).kernels
    assert kernels
    assert not [kernel for kernel in kernels if kernel.shared > SHARED_MEMORY]


@each_arm
def test_no_kernel_spills_more_than_recorded(arm, measured):
    spilling = [kernel for kernel in measured(arm).kernels if kernel.stack]
    print(f"{arm}: {spilling}")
    assert not [kernel for kernel in spilling if kernel.stack > STACK[arm]]
