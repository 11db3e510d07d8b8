"""Results: figures of the rounds, differences beyond rounding, ratios."""

import math

import pytest

from pretrain_cli.engine.benchmark import results
from pretrain_cli.engine.benchmark.results import ratios, summarize
from pretrain_cli.engine.runtime.peak_flops import Peak
from tests.engine.benchmark.test_rounds import IN_FORCE, a_round, an_arm, in_dtype


def test_figures_are_computed_from_the_steps_of_all_rounds():
    peak = Peak(flops=1e10, source="measured", measured=1e10)
    rounds = {
        "a": [a_round(times=[0.1, 0.2, 0.3]), a_round(times=[0.4, 0.5], warmup=[9.0])],
        "b": [a_round(times=[0.4, 0.4, 0.4]), a_round(times=[0.9, 0.9])],
    }
    result = summarize(an_arm("a", same_as="b", beside="b"), rounds, peak)
    found = result.figures
    assert found.step_median == 0.3
    assert (found.step_fastest, found.step_slowest) == (0.1, 0.5)
    assert found.tokens_per_second == pytest.approx(96 / 0.3)
    assert found.warmup == 1.0
    assert found.compile_time == pytest.approx(1.0 - 2 * 0.3)
    assert found.worth == pytest.approx((0.4 / 0.2 + 0.9 / 0.45) / 2)
    # FLOPs per token: 6 per matrix weight, and 12 × 64 (4 heads of 16) per key that it attends to;
    # five layers have a window of 8, one attends to all of T = 48
    seen = 5 * (8 * 9 / 2 + 40 * 8) / 48 + 49 / 2
    matrices = 6 * (64 * 16 * (2 * 4 + 2 * 1) + 3 * 64 * 96) + 300 * 64
    flops = 6 * matrices + 12 * 64 * seen
    assert result.flops_per_token == pytest.approx(flops)
    assert found.mfu == pytest.approx(flops * 96 / 0.3 / 1e10)
    conventional = 6 * matrices + 12 * 64 * 48 * 6
    assert found.mfu_conventional == pytest.approx(conventional * 96 / 0.3 / 1e10)
    assert (found.loss, found.loss_difference, result.differs) == (4.0, 0.0, "")


@pytest.mark.parametrize(
    ("dtype", "loss", "differs"),
    [
        ("float32", 4.0 * (1 + 5e-5), False),
        ("float32", 4.0 * (1 + 2e-4), True),
        ("float32", 4.0 * (1 - 2e-4), True),
        ("bfloat16", 4.0 * (1 + 5e-3), False),
        ("bfloat16", 4.0 * (1 + 2e-2), True),
        ("bfloat16", math.nan, True),
    ],
)
def test_the_loss_tolerance_depends_on_the_dtype(dtype, loss, differs):
    rounds = {"a": [a_round(losses=[6.0, loss], speed=in_dtype(dtype))], "b": [a_round()]}
    result = summarize(an_arm("a", same_as="b"), rounds, Peak(1e10, "", 1e10))
    assert bool(result.differs) is differs
    if differs:
        assert "differs from b: loss" in result.differs
        assert dtype in result.differs


@pytest.mark.parametrize(("loss", "differs"), [(0.0, False), (1e-9, True)])
def test_a_loss_is_compared_with_one_of_zero(loss, differs):
    rounds = {"a": [a_round(losses=[6.0, loss])], "b": [a_round(losses=[6.0, 0.0])]}
    result = summarize(an_arm("a", same_as="b"), rounds, Peak(1e10, "", 1e10))
    assert bool(result.differs) is differs


def test_a_different_first_gradient_norm_is_a_difference():
    rounds = {"a": [a_round(gradient_norms=[2.1, 1.9])], "b": [a_round()]}
    result = summarize(an_arm("a", same_as="b"), rounds, Peak(1e10, "", 1e10))
    assert "first gradient norm 0.05 of its size" in result.differs


def test_ratios_pair_the_rounds_of_arms_with_equal_compilation():
    compiled = IN_FORCE | {"compile": {"asked": True, "in_force": True}}
    process = {name: {"asked": False, "in_force": False} for name in results.PROCESS_SETTINGS}
    rounds = {
        "ours": [a_round(times=[0.1], peak_memory=5, speed=IN_FORCE | compiled)] * 2,
        "plain": [a_round(times=[0.3])],
        "peer": [a_round(times=[t], peak_memory=10, speed=process | compiled) for t in (0.2, 0.4)],
    }
    found = [an_arm("ours"), an_arm("plain"), an_arm("peer", peer="transformers")]
    (ratio,) = ratios([summarize(arm, rounds, Peak(1e10, "", 1e10)) for arm in found])
    assert (ratio.arm, ratio.ours) == ("peer", "ours")
    assert ratio.tokens_per_second == pytest.approx(3.0)
    assert (ratio.lowest, ratio.highest) == pytest.approx((2.0, 4.0))
    assert ratio.peak_memory == 0.5
