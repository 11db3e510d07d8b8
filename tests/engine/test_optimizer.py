"""Learning rates against closed forms, and what is decayed."""

import math

import pytest

from pretrain_cli.config import OptimizerSettings
from pretrain_cli.engine.optimizer import build_optimizer, learning_rate
from pretrain_cli.engine.plan import suggested_learning_rate
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.presets import preset


def rates(steps=100, warmup=10, **settings):
    optimizer = OptimizerSettings(**settings)
    return [
        learning_rate(step, peak=2.0, steps=steps, warmup_steps=warmup, settings=optimizer)
        for step in range(steps)
    ]


def test_warm_up_is_linear_and_reaches_the_peak():
    assert rates()[:10] == pytest.approx([0.2 * i for i in range(1, 11)])


def test_cosine_ends_near_the_final_fraction():
    after = rates(final_fraction=0.1)[10:]
    expected = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 90)) / 2) for i in range(90)]
    assert after == pytest.approx(expected)


def test_wsd_is_constant_and_then_linear():
    after = rates(schedule="wsd", decay_fraction=0.5, final_fraction=0.0)[10:]
    assert after[:45] == pytest.approx([2.0] * 45)
    assert after[45:] == pytest.approx([2.0 * (1 - i / 45) for i in range(45)])


def test_constant_stays():
    assert set(rates(schedule="constant")[10:]) == {2.0}


def test_a_run_of_warm_up_only_has_a_rate_for_every_step():
    assert rates(steps=5, warmup=10) == pytest.approx([0.2 * i for i in range(1, 6)])


def test_matrices_are_decayed_and_norms_are_not():
    model = Decoder(preset("gemma3-tiny"))
    groups = build_optimizer(model, OptimizerSettings(), fused=True).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == ("norm" not in name), name


def test_the_suggested_rate_falls_with_size():
    # Brown et al. 2020, table 2.1
    table = {125e6: 6e-4, 350e6: 3e-4, 760e6: 2.5e-4, 1.3e9: 2e-4, 2.7e9: 1.6e-4, 13e9: 1e-4}
    for parameters, rate in table.items():
        assert suggested_learning_rate(int(parameters)) == pytest.approx(rate, rel=0.35)
    assert suggested_learning_rate(1000) == 4e-3
