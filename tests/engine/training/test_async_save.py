"""Asynchronous saves: exact contents, events once complete, waits, failures and disk space."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pretrain_cli.cli import app
from pretrain_cli.engine.runs import checkpoint, retention
from pretrain_cli.engine.runs.events import Notice, Saved, StepMetrics, Unsaved
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.engine.training import async_save
from pretrain_cli.engine.training import train as train_module
from pretrain_cli.engine.training.train import train
from pretrain_cli.errors import ConfigError, PretrainError
from tests.engine.runtime.test_stop import signalled
from tests.engine.training.test_resume import assert_same_weights, numbers, resume

SOON = 20  # seconds; longest wait for any event of these tests


def rows(run, kind):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["kind"] == kind]


def steps_of(run):
    return [retention.step_of(folder) for folder in retention.checkpoints(run)]


@pytest.fixture
def held_back(monkeypatch):
    """Return hold(step): writing that step's checkpoint waits until the returned event is set."""

    def hold(step):
        allowed, real = threading.Event(), checkpoint.write_checkpoint

        def write(folder, contents, **options):
            if contents.state.step == step:
                assert allowed.wait(SOON), "training did not go on"
            return real(folder, contents, **options)

        monkeypatch.setattr(checkpoint, "write_checkpoint", write)
        return allowed

    return hold


@pytest.fixture
def failing(monkeypatch):
    """Return fail(error, *steps): writing the checkpoint of a listed step raises `error` midway, as
    many times as the step is listed."""

    def fail(error, *steps):
        left, real = list(steps), checkpoint.write_checksums

        def seal(folder, sums):
            step = json.loads((folder / checkpoint.STATE).read_text())["step"]
            if step in left:
                left.remove(step)
                raise error
            return real(folder, sums)

        monkeypatch.setattr(checkpoint, "write_checksums", seal)

    return fail


# --- in the background ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gemma3-tiny", "qwen3-tiny"])
def test_a_checkpoint_keeps_its_steps_weights_as_training_continues(
    settings, run, tmp_path, held_back, model
):
    common = {"model__name": model, "train__checkpoint_every": 2, "train__keep_checkpoints": 9}
    run(settings("stopped", **common), stop=StopRequest(after_step=2))
    written, events = held_back(2), []

    def report(event):
        events.append(event)
        if isinstance(event, StepMetrics) and event.step == 4:
            assert steps_of(tmp_path / "run") == []
            assert not any(isinstance(event, Saved) for event in events)
            written.set()
        if isinstance(event, Saved):
            assert event.path == tmp_path / f"run/checkpoints/step-{event.step:06d}"
            assert checkpoint.find_damage(event.path) is None

    train(settings(**common), report)
    assert [event.step for event in events if isinstance(event, Saved)] == [2, 4, 6]
    second = "checkpoints/step-000002"
    assert_same_weights(tmp_path / "run" / second, tmp_path / "stopped" / second)


def test_a_second_save_waits_for_the_first(settings, monkeypatch, held_back):
    written, events, order, take = held_back(2), [], [], checkpoint.take_snapshot

    def report(event):
        events.append(event)
        if isinstance(event, StepMetrics) and event.step == 4:
            threading.Timer(0.5, written.set).start()
        if isinstance(event, Saved):
            order.append(("saved", event.step))

    def taking(model, optimizer, state, **options):
        order.append(("copied", state.step))
        return take(model, optimizer, state, **options)

    monkeypatch.setattr(checkpoint, "take_snapshot", taking)
    train(settings(train__checkpoint_every=2), report)
    assert order == [(what, step) for step in (2, 4, 6) for what in ("copied", "saved")]
    second = next(event for event in events if isinstance(event, Saved) and event.step == 4)
    assert second.stall > 0.2


def test_metrics_hold_the_stall_seconds_and_bytes_of_each_save(settings, run, tmp_path):
    events = run(settings(train__checkpoint_every=3))
    saved = [event for event in events if isinstance(event, Saved)]
    found = rows(tmp_path / "run", "saved")
    assert [row["step"] for row in found] == [3, 6]
    for row, event in zip(found, saved, strict=True):
        assert row["stall"] == event.stall > 0
        assert row["seconds"] == event.seconds > 0
        sizes = [path.stat().st_size for path in event.path.rglob("*") if path.is_file()]
        assert row["bytes"] == sum(sizes)
    steps = [event for event in events if isinstance(event, StepMetrics)]
    assert steps[3].save_stall >= saved[0].stall


def test_a_bug_in_the_background_thread_ends_the_run(settings, run, failing):
    failing(ZeroDivisionError("a bug"), 2)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(settings(train__checkpoint_every=2))


def test_training_waits_for_saves_if_memory_lacks_room_for_a_copy(
    settings, run, tmp_path, monkeypatch
):
    common = {"train__checkpoint_every": 2, "train__keep_checkpoints": 9}
    run(settings("copied", **common))
    monkeypatch.setattr(async_save, "available_memory", lambda: 1000)
    events = run(settings("waited", **common))
    [notice] = [e.text for e in events if isinstance(e, Notice) and "for every save" in e.text]
    assert "1.0 kB are left" in notice
    order = [event.step for event in events if isinstance(event, StepMetrics | Saved)]
    assert order == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    [second, _, _] = [event for event in events if isinstance(event, Saved)]
    assert second.stall > second.seconds
    for step in (2, 4, 6):
        place = f"checkpoints/step-{step:06d}"
        assert_same_weights(tmp_path / "copied" / place, tmp_path / "waited" / place)


@pytest.mark.parametrize("fault", ["memory", "refused"])
def test_without_pinned_memory_a_gpus_saves_are_complete(
    settings, run, tmp_path, monkeypatch, fault
):
    run(settings("plain", train__checkpoint_every=3))
    real = torch.Tensor.to

    def refusing(tensor, *arguments, non_blocking=False, **options):
        if non_blocking and arguments == ("cpu",):  # as a copy to pinned memory is asked for
            raise RuntimeError("CUDA error: out of memory\nCompile with …")
        return real(tensor, *arguments, non_blocking=non_blocking, **options)

    monkeypatch.setattr(async_save, "runs_behind", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "to", refusing)
    monkeypatch.setattr(
        async_save, "available_memory", lambda: 10**6 if fault == "memory" else 10**12
    )
    events = run(settings("pageable", train__checkpoint_every=3))
    [text] = [e.text for e in events if isinstance(e, Notice) and "pageable" in e.text]
    reason = {"memory": "and 1.0 MB are left", "refused": "was refused: CUDA error: out of memory"}
    assert text.endswith(reason[fault])
    for step in (3, 6):
        place = f"checkpoints/step-{step:06d}"
        assert_same_weights(tmp_path / "plain" / place, tmp_path / "pageable" / place)


def test_a_checkpoint_is_written_after_its_queued_copies(settings, run, tmp_path, monkeypatch):
    """The copies stand in for a GPU's: they are made when the writing thread waits for them."""
    run(settings("plain", train__checkpoint_every=3))
    queue = []

    def queued(saver, tensor, *, copy):
        source, result = tensor.clone(), torch.full_like(tensor, 7.0)
        queue.append(lambda: result.copy_(source))
        return result

    def completion(device):
        copies = queue.copy()
        queue.clear()
        return lambda: [copy() for copy in copies]

    monkeypatch.setattr(async_save.AsyncSaver, "_to_host", queued)
    monkeypatch.setattr(checkpoint, "completion", completion)
    run(settings("queued", train__checkpoint_every=3))
    for step in (3, 6):
        place = f"checkpoints/step-{step:06d}"
        assert_same_weights(tmp_path / "plain" / place, tmp_path / "queued" / place)


# --- signals -------------------------------------------------------------------------------------


def test_a_stop_during_a_save_waits_for_it_and_saves_the_last_step(
    settings, run, tmp_path, monkeypatch
):
    common = {"train__eval_every": 3, "train__checkpoint_every": 2, "train__keep_checkpoints": 9}
    run(settings("straight", **common))
    with StopRequest() as request, monkeypatch.context() as patch:
        real = checkpoint.write_checksums

        def seal(folder, sums):
            if not request.reason:
                signalled(request)
                time.sleep(0.2)
            return real(folder, sums)

        patch.setattr(checkpoint, "write_checksums", seal)
        events = run(settings("stopped", **common), stop=request)
    last = events[-1].step
    assert events[-1].reason == "stopped"
    assert 2 <= last < 6
    assert steps_of(tmp_path / "stopped") == sorted({2, last}, reverse=True)
    saved = [event.step for event in events if isinstance(event, Saved)]
    assert saved == sorted({2, last})
    assert resume(run, tmp_path / "stopped")[-1].reason == "done"
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "straight")
    final = "checkpoints/step-000006"
    assert_same_weights(tmp_path / "stopped" / final, tmp_path / "straight" / final)


# --- several ranks -------------------------------------------------------------------------------

TWO_RANKS = """
import threading
from pretrain_cli.engine.runs import checkpoint
from pretrain_cli.engine.runs.events import StepMetrics
from pretrain_cli.engine.training.run_log import RunLog

written, write, emit = threading.Event(), checkpoint.write_checkpoint, RunLog.emit

def held_back(folder, contents, **options):
    if contents.state.step == 2:
        assert written.wait(20), "training did not go on"
    return write(folder, contents, **options)

def emitted(self, event):
    emit(self, event)
    if isinstance(event, StepMetrics) and event.step == 3:
        written.set()

checkpoint.write_checkpoint, RunLog.emit = held_back, emitted
from pretrain_cli.cli import app
app()
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_keep_training_while_the_first_writes(settings, run, tmp_path, parallel):
    common = {"train__checkpoint_every": 2, "train__keep_checkpoints": 9}
    run(settings("alone", **common))
    config = settings("two", **common)
    flags = [
        f"--set={section}.{name}={value}"
        for section, values in config.model_dump(mode="json", exclude_unset=True).items()
        for name, value in values.items()
    ]
    script = tmp_path / "held_back.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script), "train",
               *flags, f"--set=train.parallel={parallel}"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "two/metrics.jsonl").read_text().splitlines()
    order = [(row["kind"], row["step"]) for row in map(json.loads, lines)]
    assert order.index(("saved", 2)) > order.index(("step", 3))
    assert steps_of(tmp_path / "two") == [6, 4, 2]
    # With two ranks too, step 2's checkpoint holds the weights of step 2, not of step 3.
    for name in ("model", "training/optimizer"):
        ours, theirs = (
            load_file(tmp_path / folder / f"checkpoints/step-000002/{name}.safetensors")
            for folder in ("two", "alone")
        )
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-2, atol=2e-5)


# --- saves that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_save_is_reported_and_the_next_one_succeeds(
    settings, run, tmp_path, failing, code
):
    failing(OSError(code, "no luck"), 4, 4)  # after ENOSPC, the save makes room and tries again
    config = settings(train__checkpoint_every=2, train__eval_every=2)
    events = run(config)
    [unsaved] = [event for event in events if isinstance(event, Unsaved)]
    assert (unsaved.step, unsaved.reason) == (4, "no luck")
    [row] = rows(tmp_path / "run", "not_saved")
    assert (row["step"], row["reason"]) == (4, "no luck")
    assert [event.step for event in events if isinstance(event, Saved)] == [2, 6]
    assert steps_of(tmp_path / "run") == [6, 2]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_an_unsaved_step_is_never_the_best_checkpoint(settings, run, tmp_path, failing):
    """The lowest loss is at step 3 or before, where all saves fail. The best checkpoint is the best
    of steps 4 to 6."""
    failing(OSError(errno.EIO, "no luck"), 1, 2, 3)
    common = {"train__checkpoint_every": 1, "train__eval_every": 1, "train__keep_checkpoints": 1}
    run(settings(optimizer__learning_rate=0.3, optimizer__warmup_steps=3, **common))
    found = rows(tmp_path / "run", "evaluation")
    losses = {row["step"]: row["loss"] for row in found}
    assert min(losses, key=losses.__getitem__) <= 3
    best = min((4, 5, 6), key=losses.__getitem__)
    state = checkpoint.read_state(tmp_path / "run/checkpoints/step-000006")
    assert (state.best_step, state.best_loss) == (best, losses[best])
    assert steps_of(tmp_path / "run") == sorted({6, best}, reverse=True)


def test_a_run_whose_last_save_fails_ends_with_an_error(settings, run, tmp_path, failing):
    failing(OSError(errno.EIO, "no luck"), 6)
    with pytest.raises(PretrainError, match=r"step 6 is not saved: no luck\. The newest .* step 4"):
        run(settings(train__checkpoint_every=2))
    assert rows(tmp_path / "run", "not_saved")
    failing(OSError(errno.EIO, "no luck"), 3)
    with pytest.raises(PretrainError, match=r"step 3 is not saved: .* doesn't exist"):
        run(settings("stopped"), stop=StopRequest(after_step=3))


def test_a_save_on_a_full_disk_removes_the_oldest_checkpoint(settings, run, tmp_path, failing):
    failing(OSError(errno.ENOSPC, "full"), 6)
    events = run(settings(train__checkpoint_every=1, train__keep_checkpoints=3))
    assert any("full: removed step-000003" in e.text for e in events if isinstance(e, Notice))
    assert steps_of(tmp_path / "run") == [6, 5, 4]
    assert not any(isinstance(event, Unsaved) for event in events)


def test_a_full_disk_at_the_end_prints_one_line_and_exits_with_2(settings, tmp_path, monkeypatch):
    config = settings(train__sample_tokens=0)
    flags = [
        f"--set={section}.{name}={value}"
        for section, values in config.model_dump(mode="json", exclude_unset=True).items()
        for name, value in values.items()
    ]
    monkeypatch.setattr(async_save, "free_space", lambda folder: 0)
    monkeypatch.setattr(train_module, "check_space", lambda *_, **__: None)
    outcome = CliRunner().invoke(app, ["train", *flags], catch_exceptions=False)
    assert outcome.exit_code == 2
    assert "step 6 is NOT saved: a checkpoint takes" in outcome.stdout
    [line] = outcome.stderr.splitlines()
    assert line.startswith("error: step 6 is not saved: a checkpoint takes")
    assert f"pretrain train --resume {tmp_path / 'run'}" in line


# --- size on disk --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__name": "qwen3-tiny"}, {"optimizer__name": "muon"},
     {"model__tie_word_embeddings": False}],
    ids=str,
)  # fmt: skip
def test_checkpoint_size_is_known_before_the_first_save(settings, run, monkeypatch, changes):
    known, real = [], async_save.checkpoint_size
    monkeypatch.setattr(
        async_save, "checkpoint_size", lambda plan: known.append(real(plan)) or known[0]
    )
    events = run(settings(train__steps=1, **changes))
    [saved] = [event for event in events if isinstance(event, Saved)]
    assert 0 <= known[0] - saved.bytes < 250_000


def test_a_run_whose_checkpoints_cannot_fit_is_refused_at_start(
    settings, run, tmp_path, monkeypatch
):
    size = []
    real = async_save.checkpoint_size
    monkeypatch.setattr(
        async_save, "checkpoint_size", lambda plan: size.append(real(plan)) or size[0]
    )
    run(settings("measured", train__steps=1))
    several = {"train__checkpoint_every": 2, "train__keep_checkpoints": 3}
    for count, changes in ((0.9, {}), (1.9, several | {"train__keep_checkpoints": 1}),
                           (2.9, several)):  # fmt: skip
        monkeypatch.setattr(async_save, "free_space", lambda folder, n=count: n * size[0])
        with pytest.raises(ConfigError, match="free some space, choose another disk"):
            run(settings(**changes))
        assert not (tmp_path / "run").exists()
    # The three newest checkpoints fit; the best one and the one being written do not.
    several["train__checkpoint_every"] = 1
    monkeypatch.setattr(async_save, "free_space", lambda folder: 3.1 * size[0])
    events = run(settings(**several))
    told = [event.text for event in events if isinstance(event, Notice)]
    assert any(text.startswith("Up to 5 checkpoints") and "room for 3" in text for text in told)
    # On resume, existing checkpoints need no further room.
    monkeypatch.setattr(async_save, "free_space", lambda folder: 2.1 * size[0])
    assert resume(run, tmp_path / "run", train__steps=8)[-1].step == 8


def test_a_snapshot_is_freed_before_the_next_one_is_taken(settings, run, failing, monkeypatch):
    taken, real = [], checkpoint.take_snapshot

    def take(*arguments, **options):
        assert not any(contents.weights or contents.moments for contents in taken)
        taken.append(real(*arguments, **options))
        return taken[-1]

    monkeypatch.setattr(checkpoint, "take_snapshot", take)
    failing(OSError(errno.EIO, "no luck"), 2, 3)
    run(settings(train__checkpoint_every=1))
    assert len(taken) == 6


def test_a_checkpoint_holds_the_optimizers_moments(settings, run, tmp_path):
    """After the first step from zero, the moments are (1 − β₁) g and (1 − β₂) g²."""
    run(settings(train__steps=1, optimizer__betas=[0.9, 0.95]))
    moments = load_file(tmp_path / "run/checkpoints/step-000001/training/optimizer.safetensors")
    first = {n.removeprefix("exp_avg."): t for n, t in moments.items() if n.startswith("exp_avg.")}
    assert first
    for name, value in first.items():
        expected = 0.05 * (value / 0.1).square()
        torch.testing.assert_close(moments[f"exp_avg_sq.{name}"], expected, rtol=1e-4, atol=1e-12)
