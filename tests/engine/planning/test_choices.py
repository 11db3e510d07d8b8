"""Values of `auto`: the batch and the intervals of a run."""

import pytest
import torch

from pretrain_cli.config.build import build_config
from pretrain_cli.engine.planning.choices import (
    choose_checkpoint_interval,
    choose_interval,
    choose_samples_per_step,
    choose_tokens,
)
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.model.counting import suggested_tokens, training_flops
from pretrain_cli.model.presets import preset


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


def samples(tokens, *, ranks=1, seq_len=1024, **changes):
    settings = build_config({}, {f"train.{name}": value for name, value in changes.items()}, [])
    return choose_samples_per_step(
        settings, Ranks(0, ranks, torch.device("cpu")), seq_len, int(tokens)
    )


def test_a_step_has_the_best_batch_as_a_power_of_two_of_samples():
    for tokens in (1e6, 1e8, 1e10, 1e12):
        found = samples(tokens) * 1024
        best = 0.58 * tokens**0.571
        assert found == 1024 or 2**-0.5 <= found / best <= 2**0.5
    assert samples(1e10, seq_len=2048) * 2 == samples(1e10)


def test_each_rank_has_a_sample_at_least():
    assert samples(1e6, ranks=3) == 3
    assert samples(1e10, ranks=3) % 3 == 0
    assert samples(1e6, micro_batch_size=5) == 5


def test_the_budget_is_what_is_asked_for_or_follows_from_the_device():
    model = preset("qwen3-0.6b")
    flops = training_flops(model, 512).exact
    assert choose_tokens(12345, model, flops, on_cpu=True) == 12345
    assert choose_tokens(None, model, flops, on_cpu=False) == suggested_tokens(model)
    assert choose_tokens(None, model, flops, on_cpu=True) * flops == pytest.approx(1.2e13, rel=0.01)
