"""Blocked attention: its memory, torch.compile, and where it is available."""

import pytest
import torch

from pretrain_cli.model.attention_backends import blocks
from pretrain_cli.model.attention_backends.backends import BACKENDS
from tests.model.attention_backends import test_backends
from tests.model.attention_backends.cases import Sizes, conditions, starting_at

small_blocks = test_backends.small_blocks  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize("window", [None, 3])
def test_blocks_hold_the_scores_of_one_block_at_a_time(window):
    """Forward and backward of 40 queries in blocks of 5 never allocate a 40 × 40 matrix."""
    q = torch.randn(2, 2, 40, 2, 1)  # (B, Hkv, T, G, Dh)
    k = v = torch.randn(2, 2, 40, 1)
    operators = blocks._attend, blocks._backward
    with Sizes() as sizes:
        for operator, grad in zip(operators, ((), (q,)), strict=True):
            operator._init_fn(*grad, q, k, v, window, None)
    seen_by_a_block = 40 if window is None else 5 + window - 1
    assert max(sizes.noted) == max(2 * 2 * 2 * 5 * seen_by_a_block, q.numel())


# torch 2.14's opcheck reads .grad of its own tensors, for any operator.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_operator_passes_opcheck_for_torch_compile():
    """The operator is opaque: the compiler knows only its shapes and gradients."""
    q = torch.randn(2, 2, 7, 3, 4, requires_grad=True)
    k, v = (torch.randn(2, 2, 12, 4, requires_grad=True) for _ in range(2))
    for documents in (None, starting_at((3,), (5, 9), length=12)):
        torch.library.opcheck(torch.ops.pretrain.blocked_attention.default, (q, k, v, 3, documents))


def test_blocks_are_refused_on_a_gpu_with_the_reason():
    refusal = BACKENDS["blocks"].unavailable
    assert refusal(conditions("cpu")) is None
    assert refusal(conditions("cuda")) == "it is made for CPUs"
