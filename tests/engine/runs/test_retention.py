"""Retention: the newest checkpoints, the best, one every N steps, the last finite."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import TrainSettings
from pretrain_cli.engine.runs import checkpoint, retention
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runs.events import Evaluation
from pretrain_cli.engine.runs.run_yaml import read_record, resumed_settings
from pretrain_cli.errors import CheckpointError


def make(run: Path, *states: State) -> None:
    """Write checkpoints without weights: only a state, an empty config and checksums."""
    for state in states:
        folder = run / f"checkpoints/step-{state.step:06d}"
        (folder / "training").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / checkpoint.STATE).write_text(json.dumps(dataclasses.asdict(state)))
        checkpoint.write_checksums(folder)


def steps(run: Path) -> list[int]:
    return [retention.step_of(folder) for folder in retention.checkpoints(run)]


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"keep_checkpoints": 1}, [70, 30]),
        ({"keep_checkpoints": 3}, [70, 60, 50, 30]),
        ({"keep_checkpoints": 1, "keep_best": False}, [70]),
        ({"keep_checkpoints": 1, "keep_every": 20}, [70, 60, 40, 30, 20]),
        ({"keep_checkpoints": 99}, [70, 60, 50, 40, 30, 20, 10]),
    ],
)
def test_rotation_keeps_the_newest_the_best_and_every_nth_step(tmp_path, settings, left):
    states = [State(step, best_step=10 if step < 30 else 30) for step in range(10, 80, 10)]
    make(tmp_path, *states)
    removed = retention.rotate(tmp_path, TrainSettings(**settings))
    assert steps(tmp_path) == left
    assert sorted([*left, *map(retention.step_of, removed)], reverse=True) == [*range(70, 0, -10)]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in sorted(left)
    ]


def test_rotation_never_removes_the_last_finite_checkpoint(tmp_path):
    make(tmp_path, *[State(step, finite=step <= 2) for step in range(1, 9)])
    for step in range(9, 12):
        retention.rotate(tmp_path, TrainSettings(keep_checkpoints=2))
        assert 2 in steps(tmp_path)
        make(tmp_path, State(step, finite=False))
    assert retention.newest_intact(tmp_path, print, finite=True).name == "step-000002"
    make(tmp_path, State(20))
    retention.rotate(tmp_path, TrainSettings(keep_checkpoints=2))
    assert steps(tmp_path) == [20, 11]


def test_making_room_never_removes_the_last_intact_checkpoint(tmp_path):
    make(tmp_path, *[State(step) for step in (1, 2, 3)])
    retention.make_room(tmp_path, TrainSettings(keep_checkpoints=3))
    assert steps(tmp_path) == [3, 2]
    (tmp_path / "checkpoints/step-000003/config.json").write_text("[]")
    retention.make_room(tmp_path, TrainSettings(keep_checkpoints=1))
    assert 2 in steps(tmp_path)
    assert retention.newest_intact(tmp_path, print).name == "step-000002"


def test_making_room_removes_nothing_if_no_checkpoint_is_intact(tmp_path):
    make(tmp_path, State(1), State(2, finite=False))
    (tmp_path / "checkpoints/step-000001/config.json").write_text("[]")
    assert retention.make_room(tmp_path, TrainSettings(keep_checkpoints=1)) == []
    assert steps(tmp_path) == [2, 1]


def test_an_interrupted_removal_leaves_no_partial_checkpoint(tmp_path, monkeypatch):
    make(tmp_path, State(1), State(2), State(3))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill before any deletion
    retention.rotate(tmp_path, TrainSettings(keep_checkpoints=1))
    monkeypatch.undo()
    assert steps(tmp_path) == [3]
    assert len(os.listdir(tmp_path / "checkpoints")) == 3
    retention.sweep(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["step-000003"]


def test_a_resumed_run_remembers_the_best_checkpoint(settings, run, tmp_path):
    """Use a learning rate that grows far too high: the loss rises, so an early step is the best."""
    common = {"train__checkpoint_every": 1, "train__eval_every": 1, "train__keep_checkpoints": 1}
    events = run(settings(optimizer__learning_rate=0.3, optimizer__warmup_steps=3, **common))
    losses = {e.step: e.loss for e in events if isinstance(e, Evaluation)}
    best = min(losses, key=lambda step: losses[step])
    assert best < 6
    folder = tmp_path / "run"
    assert steps(folder) == [6, best]
    state = checkpoint.read_state(folder / "checkpoints/step-000006")
    assert (state.best_step, state.best_loss) == (best, losses[best])
    record = read_record(folder)
    longer = build_config(record.settings, {"train.steps": 8}, [])
    events = run(resumed_settings(record, longer), resume=(folder, record))
    losses |= {e.step: e.loss for e in events if isinstance(e, Evaluation)}
    best = min(losses, key=lambda step: losses[step])
    assert steps(folder) == sorted({8, best}, reverse=True)
    assert retention.best_checkpoint(folder).name == f"step-{best:06d}"


def test_a_damaged_state_file_is_named_in_the_error(tmp_path):
    make(tmp_path, State(1))
    path = tmp_path / "checkpoints/step-000001" / checkpoint.STATE
    for text in ("{", "[]", '{"step": 1, "spin": 2}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"state.json: damaged"):
            checkpoint.read_state(path.parent.parent)
    retention.rotate(tmp_path, TrainSettings())
    assert steps(tmp_path) == [1]
