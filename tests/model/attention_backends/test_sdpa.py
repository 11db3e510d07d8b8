"""PyTorch's fused attention: no square matrix for a window, and few masked scores."""

import time

import pytest
import torch

from pretrain_cli.model.attention_backends.backends import BACKENDS
from pretrain_cli.model.attention_backends.mask import Mask
from tests.model.attention_backends.cases import CPU, attend, made, starting_at


@pytest.mark.parametrize("window", [1, 3, 8, 9, None])
def test_sdpa_makes_no_square_matrix_for_a_whole_sequence(window):
    lowered = BACKENDS["sdpa"].lower(Mask(8, 8, window), CPU, torch.float32)
    assert not isinstance(lowered, torch.Tensor)


@pytest.mark.parametrize("starts", [None, ((100,), (7, 8))], ids=["whole", "documents"])
def test_sdpa_computes_at_most_twice_the_scores_of_the_window(monkeypatch, starts):
    """At most T · 2 · window scores are computed; a T × T mask would need T²."""
    documents = starting_at(*starts, length=256) if starts else None
    scores = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(q, k, v, **options):
        scores.append(q.shape[0] * q.shape[2] * k.shape[2])
        return fused(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    q, k, v = made(256, 256)
    attend("sdpa", q, k, v, 8, documents=documents)
    assert sum(scores) <= q.shape[0] * 256 * 2 * 8


def test_a_single_query_after_a_cache_needs_no_mask():
    assert BACKENDS["sdpa"].lower(Mask(1, 8, 8), CPU, torch.float32) is False


@pytest.mark.slow
def test_a_folded_window_takes_at_most_a_quarter_of_full_attention():
    """Time forward and backward of 8192 positions, alternating a window of 512 and full attention.
    The best of up to 6 rounds counts, since other programs disturb the timing."""
    length, shares = 8192, []
    q, k, v = (x[:1].requires_grad_() for x in made(length, length, group=4, head_dim=64))
    backend = BACKENDS["sdpa"]
    masks = [backend.lower(Mask(length, length, window), CPU, q.dtype) for window in (512, None)]
    while len(shares) < 6 and min(shares, default=1) > 1 / 4:
        times = [time.perf_counter()]
        for mask in masks:
            backend.attend(q, k, v, mask, 0.125).sum().backward()
            times.append(time.perf_counter())
        shares.append((times[1] - times[0]) / (times[2] - times[1]))
    assert min(shares) <= 1 / 4
