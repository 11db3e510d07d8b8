"""The learning rate of every step against a closed form."""

import math

import pytest

from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import OptimizerSettings
from pretrain_cli.engine.optim.schedule import learning_rate
from pretrain_cli.errors import ConfigError


def rates(steps=100, warmup=10, **settings):
    optimizer = OptimizerSettings(**settings)
    return [
        learning_rate(step, peak=2.0, steps=steps, warmup_steps=warmup, settings=optimizer)
        for step in range(steps)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "wsd-sqrt", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    found = rates(schedule=schedule)
    assert found[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert found[10] == 2.0


def test_cosine_ends_near_the_final_fraction():
    after = rates(final_fraction=0.1)[10:]
    expected = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 90)) / 2) for i in range(90)]
    assert after == pytest.approx(expected)


def test_linear_falls_by_the_same_amount_each_step():
    after = rates(schedule="linear", final_fraction=0.25)[10:]
    assert after == pytest.approx([2 - 1.5 * i / 90 for i in range(90)])


def test_wsd_is_constant_and_then_linear():
    after = rates(schedule="wsd", decay_fraction=0.5, final_fraction=0.0)[10:]
    assert after[:45] == pytest.approx([2.0] * 45)
    assert after[45:] == pytest.approx([2.0 * (1 - i / 45) for i in range(45)])


def test_wsd_sqrt_is_constant_and_then_one_minus_the_root():
    after = rates(schedule="wsd-sqrt", decay_fraction=0.4, final_fraction=0.1)[10:]
    assert after[:54] == pytest.approx([2.0] * 54)
    expected = [2.0 * (0.1 + 0.9 * (1 - (i / 36) ** 0.5)) for i in range(36)]
    assert after[54:] == pytest.approx(expected)


def test_constant_stays_at_the_peak():
    assert set(rates(schedule="constant")[10:]) == {2.0}


def test_a_run_of_warm_up_only_has_a_rate_for_every_step():
    assert rates(steps=5, warmup=10) == pytest.approx([0.2 * i for i in range(1, 6)])


@pytest.mark.parametrize("schedule", ["wsd", "wsd-sqrt", "constant"])
def test_the_constant_phase_does_not_depend_on_the_number_of_steps(schedule):
    assert rates(schedule=schedule)[:80] == rates(steps=300, schedule=schedule)[:80]


@pytest.mark.parametrize(
    ("setting", "schedule"),
    [("decay_fraction", "cosine"), ("decay_fraction", "linear"), ("final_fraction", "constant")],
)
def test_a_setting_that_the_schedule_does_not_use_is_refused(setting, schedule):
    flags = {"optimizer.schedule": schedule, f"optimizer.{setting}": 0.3}
    said = f"optimizer.{setting}: 0.3 has no meaning with optimizer.schedule '{schedule}'"
    with pytest.raises(ConfigError, match=said):
        build_config({}, flags, [])
