"""The step guard: skipped steps change nothing."""

import math
import random

import pytest
import torch
from torch import nn

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.optim.optimizer import build_optimizer
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.speed import build_model, resolve_speed
from pretrain_cli.engine.training.step import train_step
from pretrain_cli.engine.training.step_guard import MEMORY, StepGuard
from pretrain_cli.model.config import variant
from pretrain_cli.model.presets import preset
from tests.engine.jobs import batch_of, job_of, recipe_of

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def decisions(guard: StepGuard, numbers: list[tuple[float, float]]) -> list[bool]:
    """Return for each loss and gradient norm whether the step changes a weight."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    taken = []
    for loss, norm in numbers:
        before, parameter.grad = parameter.detach().clone(), torch.ones(2)
        guard.step(optimizer, torch.tensor(loss), torch.tensor(norm))
        taken.append(not torch.equal(before, parameter))
    return taken


def small_model():
    changes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "vocab_size": 64}
    config = variant(preset("gemma3-tiny"), changes)
    model = build_model(config, resolve_speed(SpeedConfig(dtype="float32"), CPU), CPU)
    model.initialize(1)
    return model


def fused(model):
    return build_optimizer(model, recipe_of(model), fused=True)


def unfused(model):
    return build_optimizer(model, recipe_of(model), fused=False)


def momentum(model):
    groups = [{"params": list(model.parameters()), "rate_scale": 1.0, "decay": 0.0}]
    return torch.optim.SGD(groups, momentum=0.9)


def trained(make_optimizer, batches, *, broken=(), micro_batch_size=4):
    """Return the model, its optimizer and the verdicts after one step on each batch. One gradient
    is NaN in batches whose number is in `broken`."""
    model = small_model()
    optimizer, guard = make_optimizer(model), StepGuard(ALONE)
    job = job_of(model, optimizer, guard=guard, micro_batch_size=micro_batch_size)
    state = {"poison": False}
    victim = next(p for name, p in model.named_parameters() if name.endswith("mlp.down.weight"))
    victim.register_hook(lambda grad: grad * math.nan if state["poison"] else None)
    for number, tokens in enumerate(batches):
        state["poison"] = number in broken
        train_step(job, batch_of(tokens[:, :-1], tokens[:, 1:]), StepRates(1e-2))
    return model, optimizer, guard.read()


@pytest.mark.parametrize("micro_batch_size", [4, 2])
@pytest.mark.parametrize("make_optimizer", [fused, unfused, momentum])
@pytest.mark.parametrize("broken", [{0}, {2}, {1, 2}])
def test_a_step_with_a_nan_gradient_changes_no_state(make_optimizer, broken, micro_batch_size):
    """Weights and optimizer state equal those of a run without the batch. The optimizer's count of
    steps leaves out skipped ones."""
    batches = torch.randint(1, 64, (5, 4, 17), generator=torch.Generator().manual_seed(0))
    rest = [batch for number, batch in enumerate(batches) if number not in broken]
    sizes = {"micro_batch_size": micro_batch_size}
    model, optimizer, verdicts = trained(make_optimizer, batches, broken=broken, **sizes)
    expected, expected_optimizer, _ = trained(make_optimizer, rest, **sizes)
    assert [bool(verdict.reason) for verdict in verdicts] == [n in broken for n in range(5)]
    assert verdicts[min(broken)].reason == "gradient norm is nan"
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        kept, expected_kept = optimizer.state[ours], expected_optimizer.state[theirs]
        assert kept.keys() == expected_kept.keys()
        for name in kept:
            assert torch.equal(kept[name], expected_kept[name]), name
        assert kept.get("step", 5 - len(broken)) == 5 - len(broken)


def test_a_guard_does_not_change_a_run_without_skips():
    batches = torch.randint(1, 64, (3, 4, 17), generator=torch.Generator().manual_seed(0))
    guarded, _, _ = trained(fused, batches)
    plain = small_model()
    job = job_of(plain)
    for tokens in batches:
        train_step(job, batch_of(tokens[:, :-1], tokens[:, 1:]), StepRates(1e-2))
    for ours, theirs in zip(guarded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_loss_or_norm_that_is_not_finite_is_skipped_and_named(number):
    guard = StepGuard(ALONE)
    assert decisions(guard, [(1.0, 1.0), (number, 1.0), (1.0, number), (1.0, 1.0)]) == [
        True, False, False, True,
    ]  # fmt: skip
    reasons = [verdict.reason for verdict in guard.read()]
    assert reasons == ["", f"loss is {number}", f"gradient norm is {number}", ""]
    assert guard.read() == []


def spikes_by_hand(numbers: list[float], deviations: float) -> list[bool]:
    """Return whether each number is a spike: more than `deviations` standard deviations above the
    weighted mean of the earlier numbers that are not spikes."""
    seen, weights, spikes = [], [], []
    for number in numbers:
        spike = False
        if len(seen) >= MEMORY:
            mean = math.fsum(w * x for w, x in zip(weights, seen, strict=True))
            variance = math.fsum(w * (x - mean) ** 2 for w, x in zip(weights, seen, strict=True))
            spike = number > mean + deviations * math.sqrt(variance)
        spikes.append(spike)
        if not spike:
            seen.append(number)
            weight = max(1 / len(seen), 1 / MEMORY)
            weights = [w * (1 - weight) for w in weights] + [weight]
    return spikes


@pytest.mark.parametrize("which", [0, 1])
def test_spikes_are_k_deviations_above_the_running_mean(which):
    chance = random.Random(which)
    series = [3 + 20 / (n + 10) + chance.gauss(0, 0.1) for n in range(300)]
    for place in (20, 60, 130, 131, 250):
        series[place] += 4  # 20 comes before MEMORY numbers, too early for a spike
    expected = spikes_by_hand(series, 3.0)
    assert [n for n, spike in enumerate(expected) if spike][:4] == [60, 130, 131, 250]
    numbers = [(x, 1.0) if which == 0 else (1.0, x) for x in series]
    guard = StepGuard(ALONE, skip_spikes=3.0)
    assert decisions(guard, numbers) == [not spike for spike in expected]
    reasons = [verdict.reason for verdict in guard.read()]
    assert "deviations above" in reasons[60]
    assert reasons[60].startswith(("loss", "gradient norm")[which])


def test_spikes_are_not_skipped_by_default():
    assert all(
        decisions(StepGuard(ALONE), [(1.0, 1.0 + n % 2) for n in range(60)] + [(99.0, 99.0)])
    )


def test_a_guard_restored_from_its_state_decides_the_same():
    chance = random.Random(0)
    numbers = [(chance.gauss(3, 0.1), chance.gauss(1, 0.1)) for _ in range(200)]
    straight = StepGuard(ALONE, skip_spikes=1.5, max_skips=99)
    expected = decisions(straight, numbers)
    assert 0 < expected.count(False) < 50
    first, second = (StepGuard(ALONE, skip_spikes=1.5, max_skips=99) for _ in range(2))
    halves = decisions(first, numbers[:77])
    second.load_state_dict(first.state_dict())
    halves += decisions(second, numbers[77:])
    assert halves == expected
    assert second.state_dict() == straight.state_dict()


def test_after_max_skips_in_a_row_every_step_is_skipped():
    guard = StepGuard(ALONE, max_skips=3)
    good, bad = (1.0, 1.0), (math.nan, 1.0)
    assert decisions(guard, [good, bad, bad, good, bad, bad, bad, good, good]) == [
        True, False, False, True, False, False, False, False, False,
    ]  # fmt: skip
    assert [verdict.in_a_row for verdict in guard.read()] == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert guard.is_exhausted


def test_a_started_read_ends_at_the_step_of_its_start():
    guard = StepGuard(ALONE)
    decisions(guard, [(1.0, 1.0), (math.nan, 1.0)])
    guard.start_read()
    decisions(guard, [(3.0, 1.0)])
    assert guard.took_unread()
    assert [each.in_a_row for each in guard.read(started=True)] == [0, 1]
    assert math.isnan(guard.last.loss)
    assert guard.read(started=True) == []
    assert [each.loss for each in guard.read()] == [3.0]
    assert not guard.took_unread()
