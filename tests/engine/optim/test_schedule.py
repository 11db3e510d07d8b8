"""The learning rate of every step against a closed form."""

import math

import pytest

from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import OptimizerSettings
from pretrain_cli.engine.optim.schedule import learning_rate, rates_at
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.presets import preset
from tests.engine.jobs import recipe_of


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
    after = rates(schedule="cosine", final_fraction=0.1)[10:]
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
    assert rates(schedule=schedule)[:41] == rates(steps=300, schedule=schedule)[:41]


@pytest.mark.parametrize(
    ("setting", "schedule"),
    [("decay_fraction", "cosine"), ("decay_fraction", "linear"), ("final_fraction", "constant")],
)
def test_a_setting_that_the_schedule_does_not_use_is_refused(setting, schedule):
    flags = {"optimizer.schedule": schedule, f"optimizer.{setting}": 0.3}
    said = f"optimizer.{setting}: 0.3 has no meaning with optimizer.schedule '{schedule}'"
    with pytest.raises(ConfigError, match=said):
        build_config({}, flags, [])


def recipe_at(step, **settings):
    made = recipe_of(
        preset("qwen3-tiny"), name="muon", learning_rate=2.0, warmup_steps=10, **settings
    )
    return rates_at(step, made, steps=100)


def test_weight_decay_falls_along_a_cosine_to_zero():
    found = [recipe_at(step, weight_decay_schedule="cosine").decay for step in (0, 25, 50, 99)]
    expected = [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 + math.cos(math.pi * 0.99)) / 2]
    assert found == pytest.approx(expected)
    assert recipe_at(50, weight_decay_schedule="constant").decay == 1.0


def test_momentum_rises_at_the_start_and_falls_with_the_rate():
    momentum = {
        "momentum": 0.95, "momentum_start": 0.75, "momentum_end": 0.85, "momentum_warmup_steps": 20,
        "schedule": "wsd", "decay_fraction": 0.5, "final_fraction": 0.0,
    }  # fmt: skip
    found = [recipe_at(step, **momentum) for step in (0, 10, 20, 50, 77, 99)]
    expected = [0.75, 0.85, 0.95, 0.95]
    assert [rates.momentum for rates in found[:4]] == pytest.approx(expected)
    for rates in found[4:]:
        share = rates.learning_rate / 2.0
        assert rates.momentum == pytest.approx(0.85 + 0.1 * share)
        assert 0 < share < 0.52


def test_momentum_without_a_start_or_an_end_stays():
    found = [recipe_at(s, momentum_start=None, momentum_end=None).momentum for s in (0, 50, 99)]
    assert found == [OptimizerSettings().momentum] * 3
