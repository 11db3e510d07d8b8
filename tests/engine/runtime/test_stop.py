"""Stop requests, by a signal or the clock, in every phase: the run is saved, and resuming it gives
the same result."""

import datetime
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from pretrain_cli.config.setting_types import seconds_of
from pretrain_cli.engine.runs import checkpoint, retention
from pretrain_cli.engine.runs.events import Notice, StepMetrics
from pretrain_cli.engine.runtime import stop
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.engine.sampling import batch
from pretrain_cli.engine.training import evaluate, step
from pretrain_cli.errors import ConfigError
from tests.engine.training.test_resume import assert_same_weights, numbers, resume


def signalled(request: StopRequest, number: int = signal.SIGTERM) -> None:
    """Send this process a signal, and wait until the request has received it."""
    signal.raise_signal(number)
    until = time.monotonic() + 10
    while not request.reason and time.monotonic() < until:
        time.sleep(0.001)
    assert request.reason == signal.Signals(number).name


def calling_at(function, count: int, action):
    """Return `function`, wrapped to call `action` before its count-th call."""
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            action()
        return function(*args, **kwargs)

    return wrapped


# Phase: (module, function, n, last completed step). The signal comes at the n-th call of the
# function. A step is two micro-steps; evaluations are at steps 3 and 6, saves at 4 and 6, samples
# of 8 tokens at 2, 4 and 6.
PHASES = {
    "the very first micro-step": (step, "sync_gradients", 1, 0),
    "the first micro-step of step 3": (step, "sync_gradients", 5, 2),
    "the last micro-step of step 3": (step, "sync_gradients", 6, 3),
    "an evaluation": (evaluate, "validation_batches", 1, 3),
    "the last evaluation": (evaluate, "validation_batches", 2, 6),
    "sampling": (batch, "sample_next", 2, 2),
    "the last sampling": (batch, "sample_next", 18, 6),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_stopped_run_saves_its_last_step_and_resumes_exactly(
    settings, run, tmp_path, monkeypatch, phase
):
    module, name, count, last = PHASES[phase]
    common = {"train__eval_every": 3, "train__checkpoint_every": 4, "train__sample_every": 2}
    run(settings("straight", **common))
    with StopRequest() as request, monkeypatch.context() as patch:
        patch.setattr(
            module, name, calling_at(getattr(module, name), count, lambda: signalled(request))
        )
        events = run(settings("stopped", **common), stop=request)
    assert (events[-1].step, events[-1].reason) == (last, "stopped")
    assert any("SIGTERM" in event.text for event in events if isinstance(event, Notice))
    assert [retention.step_of(path) for path in retention.checkpoints(tmp_path / "stopped")] == (
        sorted({last, 4} if last > 4 else {last} - {0}, reverse=True)
    )
    assert resume(run, tmp_path / "stopped")[-1].reason == "done"
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "straight")
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("stopped", "straight")]
    assert samples[0] == samples[1]
    final = "checkpoints/step-000006"
    assert_same_weights(tmp_path / "stopped" / final, tmp_path / "straight" / final)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_each_signal_requests_a_stop_and_its_handler_is_restored(number):
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert not request.poll()
        signalled(request, number)
        assert request.poll()
    assert signal.getsignal(number) is before


WAITING = """
import hashlib
from pretrain_cli.engine.runtime.stop import StopRequest
with StopRequest() as request:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in which Python has no control
"""


def test_a_second_signal_exits_at_once_but_a_forwarded_copy_does_not():
    process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)  # as the launcher forwards it
            time.sleep(1.2)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 128 + signal.SIGTERM
        finally:
            process.kill()


# --- several ranks -------------------------------------------------------------------------------


class Pair:
    """Two ranks as threads of one process, with the parts of `Ranks` that StopRequest needs."""

    world_size = 2

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)
        self.given: list[list[float]] = []
        self.meetings = 0

    def mean(self, numbers: list[float]) -> list[float]:
        self.given.append(numbers)
        self.barrier.wait(timeout=20)
        mean = [sum(column) / 2 for column in zip(*self.given[-2:], strict=True)]
        if self.barrier.wait(timeout=20) == 0:
            self.meetings += 1
        return mean


def test_ranks_stop_at_the_same_poll_and_agree_rarely(monkeypatch):
    monkeypatch.setattr(stop, "BETWEEN_AGREEMENTS", 0.1)
    pair, ended = Pair(), {}

    def train(rank: int) -> None:
        request = StopRequest()
        request.ranks = pair
        polls = 0
        while not request.poll() and polls < 5000:
            polls += 1
            if rank == 1 and polls == 300:
                request.reason = "SIGTERM"  # on this rank only
            time.sleep(0.001)
        ended[rank] = polls

    ranks = [threading.Thread(target=train, args=(rank,)) for rank in (0, 1)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert ended[0] == ended[1]
    assert 300 <= ended[0] < 1000
    assert pair.meetings < 60


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_to_one_of_two_ranks_saves_and_stops_both(settings, run, tmp_path, parallel):
    """Start the ranks as Slurm's srun would: no launcher forwards the signal."""
    common = {"train__log_every": 10, "train__eval_every": 10**6}
    config = settings("two", **common, train__steps=10**6, train__parallel=parallel)
    flags = [f"--set={section}.{name}={value}"
             for section, values in config.model_dump(mode="json", exclude_unset=True).items()
             for name, value in values.items()]  # fmt: skip
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "pretrain_cli", "train", *flags],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                              "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    metrics = tmp_path / "two/metrics.jsonl"
    try:
        until = time.monotonic() + 90
        while time.monotonic() < until and not (
            metrics.is_file() and len(numbers(metrics.parent)) > 3
        ):
            time.sleep(0.1)
        ranks[1].send_signal(signal.SIGTERM)
        for rank in ranks:
            _, err = rank.communicate(timeout=60)
            assert rank.returncode == 75, err
    finally:
        for rank in ranks:
            rank.kill()
    [saved] = retention.checkpoints(tmp_path / "two")
    steps = retention.step_of(saved)
    assert (
        resume(run, tmp_path / "two", train__steps=steps, train__parallel="ddp")[-1].step == steps
    )


# --- time limits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [("90s", {"seconds": 90}), ("15m", {"minutes": 15}), ("3h55m", {"hours": 3, "minutes": 55}),
     ("1d", {"days": 1}), ("1d2h3m4s", {"days": 1, "hours": 2, "minutes": 3, "seconds": 4})],
)  # fmt: skip
def test_durations_are_converted_to_seconds(settings, text, parts):
    assert seconds_of(text) == datetime.timedelta(**parts).total_seconds()
    assert settings(train__max_time=text).train.max_time == text


@pytest.mark.parametrize("text", ["3 hours", "90", 90, "", "0s", "1.5h", "55m3h"])
def test_an_invalid_duration_is_refused(settings, text):
    with pytest.raises(ConfigError, match=r"train.max_time: .* is not"):
        settings(train__max_time=text)


@pytest.mark.parametrize(("every", "last"), [(100, 4), (1, 6)])
def test_a_time_limit_stops_a_run_early_enough_to_save(
    settings, tmp_path, monkeypatch, every, last
):
    """Run with a fake clock, on which a step takes 100 s. The estimate for a save is two minutes
    until one is measured."""
    clock = [0.0]
    monkeypatch.setattr(stop, "process_age", lambda: clock[0])

    def tick(event):
        events.append(event)
        clock[0] += 100.0 * isinstance(event, StepMetrics)

    from pretrain_cli.engine.training.train import train

    events = []
    monkeypatch.setattr(checkpoint, "estimated_seconds", lambda model: 120.0)
    config = settings(train__max_time="10m", train__checkpoint_every=every, train__steps=60)
    request = StopRequest(limit="10m")
    finished = train(config, tick, stop=request)
    # The run stops two saves of 120 s and 3 s before 600 s, from 357 s on; once a short save is
    # measured, from 597 s on.
    assert (finished.step, finished.reason) == (last, "stopped")
    assert retention.checkpoints(tmp_path / "run")[0].name == f"step-{last:06d}"
    assert any("max_time: 10m" in event.text for event in events if isinstance(event, Notice))
    assert (request.save_seconds < 120.0) == (every == 1)


def test_a_time_limit_too_short_for_a_step_is_refused(settings, run):
    with pytest.raises(ConfigError, match=r"max_time: 2s is too short: no step .* give more"):
        run(settings(train__max_time="2s"))
