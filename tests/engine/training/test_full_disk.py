"""Runs on a disk that fills up: training continues, files stay whole, an unsaved end is an error.

The disk is a small tmpfs, which only root may mount. tests/engine/training/test_async_save.py
simulates the errors of a full disk without one."""

import contextlib
import errno
import io
import json
import os
import subprocess
import time

import pytest

from pretrain_cli.engine.runs import checkpoint, retention
from pretrain_cli.engine.runs.events import Evaluation, Logged, Notice, Sample, Saved, Unsaved
from pretrain_cli.engine.runs.metrics_file import MetricsFile
from pretrain_cli.engine.training import async_save
from pretrain_cli.engine.training.train import train
from pretrain_cli.errors import PretrainError
from pretrain_cli.files import append_line
from tests.engine.training.test_resume import numbers, resume

SIZE = 4_000_000
"""Bytes of the disk; a checkpoint of the tests' model takes about 1.2 MB."""


@pytest.fixture
def disk(tmp_path):
    """Return a folder on which a tmpfs of SIZE bytes is mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a disk of the test's own")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk could be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    """Fill the disk to the last byte."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def steps_of(run):
    return [retention.step_of(folder) for folder in retention.checkpoints(run)]


def test_training_continues_on_a_full_disk_and_saves_later(settings, run, tmp_path, disk):
    """The disk is full from step 3 until the save of step 4 has failed. Lines wait in memory
    meanwhile, and none is missing at the end."""
    common = {"train__checkpoint_every": 2, "train__keep_checkpoints": 1, "train__eval_every": 3,
              "train__sample_every": 3, "train__steps": 8}  # fmt: skip
    run(settings("straight", **common))
    events = []

    def report(event):
        events.append(event)
        if isinstance(event, Evaluation) and event.step == 3:
            while steps_of(disk / "run") != [2]:
                time.sleep(0.01)
            fill(disk)
        if isinstance(event, Unsaved):
            (disk / "ballast").unlink()

    train(settings("disk/run", **common), report)
    [unsaved] = [event for event in events if isinstance(event, Unsaved)]
    assert unsaved.step == 4
    assert "are free" in unsaved.reason
    told = [event.text for event in events if isinstance(event, Notice)]
    # The last page of metrics.jsonl may still have room.
    assert sum("metrics.jsonl: No space left" in text for text in told) <= 1
    assert sum("samples.jsonl: No space left" in text for text in told) == 1
    assert [event.step for event in events if isinstance(event, Sample)] == [3, 6, 8]
    found = [row for row in numbers(disk / "run") if row["kind"] != "not_saved"]
    assert found == numbers(tmp_path / "straight")
    assert steps_of(disk / "run") == steps_of(tmp_path / "straight")
    assert all(checkpoint.find_damage(path) is None for path in retention.checkpoints(disk / "run"))


def test_a_disk_that_fills_during_a_save_loses_an_older_checkpoint(
    settings, run, disk, monkeypatch
):
    """The disk holds three checkpoints, and three are kept. The check of free space is disabled, so
    that the fourth save fails midway."""
    monkeypatch.setattr(async_save, "free_space", lambda folder: 10**9)
    common = {"train__checkpoint_every": 1, "train__keep_checkpoints": 3, "train__keep_best": False}
    events = run(settings("disk/run", **common))
    told = [event.text for event in events if isinstance(event, Notice)]
    assert any("No space left on device" in t and "removed step-000001" in t for t in told)
    assert [event.step for event in events if isinstance(event, Saved)] == [1, 2, 3, 4, 5, 6]
    assert all(checkpoint.find_damage(path) is None for path in retention.checkpoints(disk / "run"))
    assert not list((disk / "run/checkpoints").glob(".*"))


def test_a_run_ending_on_a_full_disk_warns_and_can_be_resumed(settings, run, tmp_path, disk):
    common = {"train__checkpoint_every": 3, "train__keep_checkpoints": 1}
    run(settings("straight", **common))

    def report(event):
        if isinstance(event, Saved):
            fill(disk)

    with pytest.raises(PretrainError, match=r"step 6 is not saved: .* The newest .* is step 3"):
        train(settings("disk/run", **common), report)
    lines = (disk / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"step"' in line][-1] <= 6
    (disk / "ballast").unlink()
    assert resume(run, disk / "run")[-1].reason == "done"
    assert numbers(disk / "run") == numbers(tmp_path / "straight")


# --- whole lines ---------------------------------------------------------------------------------


class Full(io.FileIO):
    """File on a disk that has room for `room` more bytes."""

    room = 0

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(bytes(data)[: self.room])
        self.room -= taken
        return taken


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    with Full(tmp_path / "lines", "ab") as file:
        file.room = 10
        append_line(file, b"whole\n")
        with pytest.raises(OSError, match="No space"):
            append_line(file, b"not so\n")
        assert (tmp_path / "lines").read_bytes() == b"whole\n"
        file.room = 100
        append_line(file, b"again\n")
    assert (tmp_path / "lines").read_bytes() == b"whole\nagain\n"


def test_metrics_lines_wait_for_room_with_one_notice(tmp_path):
    told = []
    metrics = MetricsFile(tmp_path / "metrics.jsonl", told.append, upto=0)
    metrics.file.close()
    file = metrics.file = Full(tmp_path / "metrics.jsonl", "ab")
    written: list[Logged] = [Unsaved(step, 0.0, "no reason") for step in range(4)]
    for event in written[:3]:
        metrics.write(event)
    assert len(told) == 1
    with pytest.raises(OSError, match="No space"):
        metrics.sync()
    file.room = 10**6
    metrics.write(written[3])
    metrics.sync()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    file.room = 5
    metrics.write(written[0])
    metrics.close()
    assert "its last lines, 1 of them, are lost" in told[-1]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines
