"""The estimate of a step's memory against the peak that PyTorch's allocator counts."""

from itertools import product

import pytest

from pretrain_cli.model.attention_backends.backends import BACKENDS
from tests.null_gpu.arms import GEMMA, QWEN, Arm

pytestmark = pytest.mark.null_gpu

TOLERANCE = 0.05
ON_A_GPU = [name for name in BACKENDS if name != "blocks"]  # which is for CPUs
UNCOMPILED = [
    Arm(model, attention, seq_len, documents)
    for model, attention, seq_len, documents in product(
        (QWEN, GEMMA), ON_A_GPU, (1024, 8192), (False, True)
    )
    if attention != "flex"  # its kernels are always compiled; two arms of them are below
    if not (attention == "eager" and seq_len > 1024)  # holds T × T scores of every layer
]
ARMS = [
    *UNCOMPILED,
    Arm(QWEN, "flex", 1024, documents=True),
    Arm(QWEN, optimizer="muon"),
    Arm(GEMMA, optimizer="muon"),
    Arm(QWEN, micro_steps=2),
    Arm(GEMMA, micro_steps=2),
    Arm(QWEN, dtype="float32"),
    Arm(GEMMA, "sdpa", dtype="float32"),
    Arm(QWEN, compile=True),
    Arm(GEMMA, compile=True),
    Arm(GEMMA, seq_len=8192, documents=True, compile=True),
]


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_peak_memory_is_estimated_within_5_percent(arm, measured):
    observed = measured(arm)
    ratio = observed.estimated / observed.peak
    print(f"{arm}: estimate {observed.estimated:,}, peak {observed.peak:,}, {ratio:.3f}")
    assert ratio == pytest.approx(1, abs=TOLERANCE)
