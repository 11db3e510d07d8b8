"""kill -9 at random moments of every phase: resumed runs end as an uninterrupted run does."""

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.engine.runs import checkpoint, metrics_file, retention
from pretrain_cli.engine.runs.run_yaml import read_record
from pretrain_cli.engine.runtime.stop import SAME_REQUEST, StopRequest
from pretrain_cli.engine.training import evaluate, train
from tests.engine.training.test_resume import assert_same_weights, numbers, resume

KILLS = 25
"""Kills for each model."""
PHASES = {
    "training": (train, "train_step", 12),
    "copying": (checkpoint, "take_snapshot", 5),
    "writing": (checkpoint, "write_weights", 5),
    "sealing": (checkpoint, "write_checksums", 5),
    "removing": (retention, "remove", 3),
    "evaluating": (evaluate, "validation_batches", 3),
    "logging": (metrics_file, "append_line", 12),
}
"""Phase: (module, function, n). A kill's timer starts at a random one of the function's first n
calls."""


def die_after(phase: str, count: int, seconds: float) -> None:
    """Kill this process `seconds` after the count-th call of the phase's function."""
    module, name, _ = PHASES[phase]
    function, calls = getattr(module, name), []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == count:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(*args, **options)

    setattr(module, name, counted)


def go_on(settings: RunConfig, run: Path, death: tuple[str, int, float] | None) -> None:
    """Start the run, or resume it if it exists."""
    torch.set_num_threads(1)
    train.PEAK_SECONDS = 0.01
    if death:
        die_after(*death)
    where = {"resume": (run, read_record(run))} if (run / "run.yaml").exists() else {}
    train.train(settings, lambda event: None, **where)


@pytest.fixture(scope="module")
def forks():
    """Return a context that forks from a process with all modules loaded and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pretrain_cli.engine.training.train", "pytest", "safetensors.torch"]
    )
    return context


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma3-tiny", "qwen3-tiny"])
def test_a_run_killed_at_any_moment_ends_as_an_uninterrupted_one(
    settings, run, tmp_path, forks, model
):
    common = {
        "model__name": model, "train__steps": 24, "train__checkpoint_every": 2,
        "train__eval_every": 3, "train__sample_every": 6,
    }  # fmt: skip
    run(settings("straight", **common))
    chance, kills, runs = random.Random(model), 0, 0
    while kills < KILLS:
        runs += 1
        folder = tmp_path / f"killed-{runs}"
        config = settings(folder.name, **common)
        ended = False
        while not ended:
            phase = chance.choice(list(PHASES))
            death = (phase, chance.randint(1, PHASES[phase][2]), chance.choice((0, 0.02))
                     * chance.random())  # fmt: skip
            process = forks.Process(
                target=go_on, args=(config, folder, death if kills < KILLS else None)
            )
            process.start()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            ended = process.exitcode == 0
            kills += not ended
        assert numbers(folder) == numbers(tmp_path / "straight")
        samples = [(tmp_path / name / "samples.jsonl").read_text()
                   for name in (folder.name, "straight")]  # fmt: skip
        assert samples[0] == samples[1]
        last = "checkpoints/step-000024"
        assert_same_weights(folder / last, tmp_path / "straight" / last)
        assert not list((folder / "checkpoints").glob(".*"))
        for path in retention.checkpoints(folder):
            assert checkpoint.find_damage(path) is None


def signal_twice_while_saving(settings: RunConfig, run: Path) -> None:
    """Send SIGTERM twice near the end of the second save, which would then take another minute."""
    torch.set_num_threads(1)
    real = checkpoint.write_checksums

    def seal(folder, sums):
        if folder.name == ".step-000004.partial":
            signal.raise_signal(signal.SIGTERM)
            time.sleep(SAME_REQUEST + 0.2)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
        real(folder, sums)

    checkpoint.write_checksums = seal
    with StopRequest() as request:
        train.train(settings, lambda event: None, stop=request)


def test_a_second_signal_during_a_save_keeps_the_older_checkpoint(settings, run, tmp_path, forks):
    common = {"train__checkpoint_every": 2, "train__keep_checkpoints": 1}
    run(settings("straight", **common))
    process = forks.Process(
        target=signal_twice_while_saving, args=(settings("left", **common), tmp_path / "left")
    )
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 128 + signal.SIGTERM
    [left] = retention.checkpoints(tmp_path / "left")
    assert (left.name, checkpoint.find_damage(left)) == ("step-000002", None)
    resume(run, tmp_path / "left")
    assert numbers(tmp_path / "left") == numbers(tmp_path / "straight")
    assert not list((tmp_path / "left/checkpoints").glob(".*"))
