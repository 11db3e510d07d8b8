"""The learning-rate range test: rates, stopping, suggestion, and written files."""

import json
import sys

import pytest

from pretrain_cli.engine.runs.events import Notice
from pretrain_cli.engine.runtime.stop import Stopped, StopRequest
from pretrain_cli.engine.training import lr_find
from pretrain_cli.engine.training.lr_find import find_learning_rate, has_diverged, smooth, suggest
from pretrain_cli.engine.training.step_guard import StepGuard
from pretrain_cli.errors import ConfigError

RATES = [10.0 ** (i / 10 - 6) for i in range(61)]


def search(settings, folder):
    events, steps = [], []
    progress, stop = lambda *step: steps.append(step), StopRequest()
    test = find_learning_rate(settings, folder, events.append, progress, stop)
    return test, events, steps


def test_rates_rise_by_a_constant_factor_and_two_files_are_written(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test, _, steps = search(settings(train__steps=13), tmp_path / "found")
    expected = [10 ** (i / 2 - 6) for i in range(13)]
    assert test.rates == pytest.approx(expected[: len(test.rates)])
    assert [step[2:] for step in steps] == list(zip(test.rates, test.losses, strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found"]
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == ["lr-find.json", "lr-find.png"]
    assert (tmp_path / "found/lr-find.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "found/lr-find.json").read_text())
    assert written["losses"] == test.losses
    assert written["suggestion"] == test.suggestion


@pytest.mark.parametrize(("behind", "taken"), [(False, 5), (True, 6)])
def test_lr_find_stops_at_a_loss_that_is_not_finite(settings, tmp_path, monkeypatch, behind, taken):
    """A device that runs behind the host has taken one more step by then."""
    real, losses = StepGuard.step, []

    def spied(guard, optimizer, loss, norm):
        losses.append(loss.item())
        real(guard, optimizer, loss / 0 if len(losses) == 5 else loss, norm)

    monkeypatch.setattr(StepGuard, "step", spied)
    monkeypatch.setattr(lr_find, "runs_behind", lambda device: behind)
    test, _, _ = search(settings(train__steps=20), tmp_path)
    assert len(losses) == taken
    assert test.losses == losses[:4]


def test_steps_read_one_late_have_the_same_rates_and_losses(settings, tmp_path, monkeypatch):
    at_once, _, _ = search(settings(train__steps=12), tmp_path)
    monkeypatch.setattr(lr_find, "runs_behind", lambda device: True)
    late, _, steps = search(settings(train__steps=12), tmp_path)
    assert (late.rates, late.losses) == (at_once.rates, at_once.losses)
    assert [step[0] for step in steps] == list(range(1, len(late.losses) + 1))


def test_lr_find_takes_every_step_whatever_counts_as_a_spike(settings, tmp_path):
    """The test looks for the rate at which the loss spikes."""
    plain, _, _ = search(settings(train__steps=40), tmp_path / "plain")
    spikes, _, _ = search(settings(train__steps=40, train__skip_spikes=0.01), tmp_path / "spikes")
    assert plain.losses == spikes.losses


def test_a_stopped_range_test_writes_no_files(settings, tmp_path):
    stop, folder = StopRequest(), tmp_path / "found"

    def progress(step, *_):
        if step == 3:
            stop.reason = "SIGTERM"

    with pytest.raises(Stopped):
        find_learning_rate(settings(train__steps=12), folder, lambda _: None, progress, stop)
    assert not folder.exists()


def test_without_matplotlib_only_json_is_written_with_a_notice(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, events, _ = search(settings(train__steps=10), tmp_path / "found")
    assert [p.name for p in (tmp_path / "found").iterdir()] == ["lr-find.json"]
    said = [event.text for event in events if isinstance(event, Notice)]
    assert "No picture: matplotlib is not installed; pip install 'pretrain[plot]'" in said


def test_a_smoothed_loss_is_the_mean_weighted_by_powers():
    losses = [3.0, 5.0, 1.0]
    expected = [3.0, (0.8 * 3 + 5) / 1.8, (0.64 * 3 + 0.8 * 5 + 1) / 2.44]
    assert smooth(losses) == pytest.approx(expected)


def test_the_suggestion_is_a_quarter_of_the_rate_at_the_lowest_loss():
    valley = [6 + 0.5 * abs(i - 40) / 10 for i in range(61)]  # lowest at 1e-2
    rate, reason = suggest(RATES, valley)
    assert rate == pytest.approx(2.5e-3)
    assert "at which the loss was lowest, 6.000" in reason


def test_a_loss_that_does_not_fall_gives_no_suggestion():
    rate, reason = suggest(RATES, [7.0 - 0.001 * i for i in range(61)])
    assert rate is None
    assert "more --steps" in reason


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([8.0, 8.5], False),
        ([8.0, 8.9], True),
        ([8.0, 4.0, 5.9], False),
        ([8.0, 4.0, 6.1], True),
        ([8.0, 7.8, 8.5], False),
        ([8.0, 7.8, 8.7], True),
    ],
)
def test_lr_find_stops_when_half_of_the_improvement_is_lost(losses, diverged):
    assert has_diverged(losses) is diverged


def test_too_few_steps_are_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"train.steps: 9; a range test takes 10 or more"):
        search(settings(train__steps=9), tmp_path)
