"""Throughput, times and MFU of a run, against a fake clock and against each other; metrics that
are read a step late."""

import itertools

import pytest
import torch

from pretrain_cli.engine.runs.events import Evaluation, Started, StepMetrics
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.engine.training import throughput as metering
from pretrain_cli.engine.training import train as training
from pretrain_cli.engine.training.throughput import ThroughputMeter
from pretrain_cli.model.counting import Flops
from tests.engine.training.test_resume import numbers, resume


@pytest.fixture
def clock(monkeypatch):
    """Clock that advances only when a test changes `now`."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

        def time(self):
            return 1e9 + self.now

    clock = Clock()
    monkeypatch.setattr(metering, "time", clock)
    return clock


def read(meter, step):
    return meter.read(
        step,
        tokens=1000 * step,
        loss=2.0,
        gradient_norm=1.0,
        learning_rate=0.1,
        sources={},
        others={},
    )


def test_a_logged_line_covers_steps_since_the_last_and_the_whole_run(clock):
    meter = ThroughputMeter(
        Ranks(0, 2, torch.device("cpu")),
        flops=Flops(exact=30.0, conventional=60.0),
        peak=40_000.0,
        tokens_per_step=1000,
        tokens=2000,
        before=(2000, 50.0),
    )
    for wait in (0.5, 1.5):
        clock.now += 4
        meter.stepped(wait)
    first = read(meter, 4)
    with meter.held_up("evaluation"):
        clock.now += 6
    with meter.held_up("save"):
        clock.now += 3
    clock.now += 1
    meter.stepped(0.0)
    second = read(meter, 5)

    assert (first.tokens_per_second, second.tokens_per_second) == (2000 / 8, 1000 / 1)
    assert (first.seconds, second.seconds) == (58, 68)
    assert second.run_tokens_per_second == pytest.approx(5000 / 68)
    assert (first.data_wait, second.data_wait) == (1.0, 0.0)
    assert (first.save_stall, second.save_stall) == (0, 3)
    assert (first.evaluation_time, second.evaluation_time) == (0, 6)
    assert second.time - first.time == 10
    # 250 tokens/s × 30 FLOPs a token / (2 devices × 40,000 FLOP/s)
    assert first.mfu == pytest.approx(0.09375)
    assert first.mfu_conventional == pytest.approx(0.1875)


def test_logged_times_rates_and_tokens_agree_with_each_other(settings, run, tmp_path):
    config = settings(
        train__steps=6, train__log_every=2, train__eval_every=3, train__checkpoint_every=4
    )
    events = run(config)
    (started,) = [event for event in events if isinstance(event, Started)]
    steps = [event for event in events if isinstance(event, StepMetrics)]
    (third, _) = [event for event in events if isinstance(event, Evaluation)]
    assert third.step == 3
    assert [event.step for event in steps] == [2, 4, 6]
    assert started.time < steps[0].time < steps[1].time < steps[2].time
    for earlier, later in itertools.pairwise(steps):
        passed = later.seconds - earlier.seconds
        assert later.time - earlier.time == pytest.approx(passed, abs=0.01)
        # All time is training, save stalls or evaluation.
        training = 2 * 128 / later.tokens_per_second
        assert training + later.save_stall + later.evaluation_time == pytest.approx(passed)
        assert later.run_tokens_per_second == pytest.approx(later.tokens / later.seconds)
        assert 0 <= later.data_wait <= training
        assert later.mfu == pytest.approx(
            later.tokens_per_second * started.flops_per_token / started.peak_flops
        )
        assert later.mfu_conventional > later.mfu
    assert [event.save_stall > 0 for event in steps] == [False, False, True]
    assert [event.evaluation_time > 0 for event in steps] == [False, True, False]


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_losses_do_not_depend_on_gradient_accumulation(settings, run, packing):
    whole, *parts = [
        [
            (event.loss, event.gradient_norm)
            for event in run(
                settings(str(rows), data__packing=packing, train__micro_batch_size=rows)
            )
            if isinstance(event, StepMetrics)
        ]
        for rows in (4, 2, 1)
    ]
    assert len(whole) == 6
    for part in parts:
        for (loss, norm), (expected_loss, expected_norm) in zip(part, whole, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-3)


@pytest.fixture
def late(monkeypatch):
    """Return a function that makes runs read their metrics a step late, as on a GPU."""
    return lambda: monkeypatch.setattr(metering, "runs_behind", lambda device: True)


def test_late_metrics_are_those_of_their_own_steps(settings, tmp_path, monkeypatch, late):
    """Steps 1, 2 and 4 are reported after the next one has begun; 3 and 6 are evaluated and 5 is
    saved, so they are reported at once."""
    real, orders = training.train_step, {}
    common = {"train__eval_every": 3, "train__checkpoint_every": 5, "optimizer__z_loss": 1e-3}
    for name in ("at-once", "late"):
        order = orders[name] = []

        def begun(*arguments, order=order, **options):
            order.append("begun")
            return real(*arguments, **options)

        def told(event, order=order):
            if isinstance(event, StepMetrics | Evaluation):
                order.append((type(event).__name__, event.step, getattr(event, "z_loss", None)))

        monkeypatch.setattr(training, "train_step", begun)
        training.train(settings(name, **common), told)
        late()
    assert numbers(tmp_path / "late") == numbers(tmp_path / "at-once")
    at_once, behind = ([one for one in order if one != "begun"] for order in orders.values())
    assert behind == at_once
    begun_at = [
        orders["late"][:place].count("begun")
        for place, one in enumerate(orders["late"])
        if one[0] == "StepMetrics"
    ]
    assert begun_at == [2, 3, 3, 5, 5, 6]


@pytest.mark.parametrize("log_every", [1, 2])
def test_a_stopped_run_reports_its_last_step_before_its_save(
    settings, run, tmp_path, late, log_every
):
    common = {"train__log_every": log_every, "train__eval_every": 6}
    run(settings("straight", **common))
    late()
    run(settings("stopped", **common), stop=StopRequest(after_step=4))
    kinds = [row["kind"] for row in numbers(tmp_path / "stopped")]
    assert kinds == ["step"] * (4 // log_every)
    resume(run, tmp_path / "stopped")
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "straight")
