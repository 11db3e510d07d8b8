"""Values of `auto`: the intervals of a run, and the learning rate by model size."""

import pytest

from pretrain_cli.engine.planning.choices import (
    choose_checkpoint_interval,
    choose_interval,
    suggested_learning_rate,
)


@pytest.mark.parametrize(
    ("given", "steps", "interval"), [("auto", 1000, 200), ("auto", 20, 50), (7, 1000, 7)]
)
def test_an_interval_is_a_fifth_of_the_run_but_not_too_short(given, steps, interval):
    assert choose_interval(given, steps, at_least=50) == interval


@pytest.mark.parametrize(
    ("given", "steps", "eval_every", "every"),
    [
        ("auto", 526, 106, 106),
        ("auto", 1000, 30, 210),  # 200, rounded up to an evaluated step
        ("auto", 100, 500, 100),  # not rounded: evaluations are rarer than saves
        (33, 1000, 50, 33),
    ],
)
def test_checkpoints_by_default_fall_on_evaluated_steps(given, steps, eval_every, every):
    assert choose_checkpoint_interval(given, steps, eval_every) == every


def test_a_larger_model_gets_a_smaller_learning_rate_with_a_cap():
    rates = [suggested_learning_rate(int(size)) for size in (1e3, 1e6, 1e8, 1e10)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 4e-3
