"""Rotary positions by hand: the pairs, their angles, and linear scaling."""

import math

import pytest
import torch

from pretrain_cli.model.rope import rope_table, rotate


def table(positions, head_dim=4, base=100.0, factor=1.0, dtype=torch.float32):
    return rope_table(torch.tensor(positions), head_dim, base=base, factor=factor, dtype=dtype)


def test_angles_are_the_position_over_powers_of_the_base():
    """With Dh 4 and base 100 the two pairs turn by position · 1 and position · 1/10."""
    cos, sin = table([0, 3])
    assert cos.shape == sin.shape == (2, 1, 4)
    angles = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 0.3, 3.0, 0.3]]).unsqueeze(1)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_the_first_half_is_paired_with_the_second():
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    turned = rotate(x, table([2])).flatten()
    torch.testing.assert_close(turned, torch.tensor([math.cos(2), 0.0, math.sin(2), 0.0]))
    x = torch.tensor([0.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    turned = rotate(x, table([2])).flatten()
    torch.testing.assert_close(turned, torch.tensor([0.0, -math.sin(0.2), 0.0, math.cos(0.2)]))


def test_a_factor_divides_positions():
    for scaled, plain in zip(table([8, 16, 40], factor=8.0), table([1, 2, 5]), strict=True):
        torch.testing.assert_close(scaled, plain)


@pytest.mark.parametrize("shift", [1, 1000])
def test_scores_depend_on_the_distance_alone(shift):
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    scores = [
        (rotate(q, table([9 + s], 64, 1e4)) * rotate(k, table([4 + s], 64, 1e4))).sum()
        for s in (0, shift)
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)


def test_angles_are_computed_in_float32_for_any_type():
    """bfloat16 cannot represent position 30,001; it would round to 29,952 before the cosine."""
    cos, sin = table([30_001], head_dim=2, dtype=torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert cos[0, 0, 0].item() == pytest.approx(math.cos(30_001), abs=4e-3)
    assert sin[0, 0, 0].item() == pytest.approx(math.sin(30_001), abs=4e-3)
