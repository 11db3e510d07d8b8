"""Skipped steps and rollbacks: logs, exact weights, resume, and runs that stop with a reason."""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from pretrain_cli.commands.display import TrainDisplay
from pretrain_cli.config.build import build_config
from pretrain_cli.engine.runs import checkpoint, retention
from pretrain_cli.engine.runs.checkpoint import read_state
from pretrain_cli.engine.runs.events import RolledBack, Saved, Skipped, StepMetrics
from pretrain_cli.engine.runs.run_yaml import read_record, resumed_settings
from pretrain_cli.engine.training import throughput
from pretrain_cli.engine.training import train as training
from pretrain_cli.engine.training.train import train
from pretrain_cli.errors import PretrainError

PER_STEP = 4  # samples per step


class Recorded:
    """Batch source that records the first sample of the last batch."""

    def __init__(self, source):
        self.source, self.current = source, None

    def __getattr__(self, name):
        return getattr(self.source, name)

    def next(self):
        self.current = self.source.sample
        return self.source.next()

    def at(self, sample):
        self.current = sample
        return self.source.at(sample)


@pytest.fixture
def poison(monkeypatch):
    """Return a set of sample numbers. Each step whose first sample is in it gets a NaN gradient,
    every time it runs."""
    poisoned, set_up = set(), training.set_up

    def poisoned_job(*arguments, **options):
        job = set_up(*arguments, **options)
        source = Recorded(job.batches)
        victim = dict(job.decoder.named_parameters())["blocks.2.mlp.down.weight"]
        victim.register_hook(lambda grad: grad * math.nan if source.current in poisoned else grad)
        return dataclasses.replace(job, batches=source)

    monkeypatch.setattr(training, "set_up", poisoned_job)
    return poisoned


def with_batches(patch, change):
    """Change the batch source of every job: `change` takes the source and returns another."""
    set_up = training.set_up

    def changed(*arguments, **options):
        job = set_up(*arguments, **options)
        return dataclasses.replace(job, batches=change(job.batches))

    patch.setattr(training, "set_up", changed)


def rows(run, *kinds):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    times = {"time", "seconds", "memory"}
    return [
        {key: value for key, value in row.items() if key not in times and "per_second" not in key}
        for row in lines
        if row["kind"] in kinds
    ]


def mathematics(run):
    """Return the rows of a metrics file without times and rates."""
    names = ("kind", "step", "loss", "gradient_norm", "learning_rate", "tokens", "bits_per_byte",
             "reason", "samples", "worst_samples", "worst_gradients", "rollbacks", "same_weights",
             "from_step")  # fmt: skip
    kinds = ("step", "evaluation", "skipped", "rollback")
    return [{name: row.get(name) for name in names} for row in rows(run, *kinds)]


def resume(run_it, folder, **changes):
    record = read_record(folder)
    flags = {name.replace("__", "."): value for name, value in changes.items()}
    settings = resumed_settings(record, build_config(record.settings, flags, []))
    return run_it(settings, resume=(folder, record))


def assert_same_weights(one, other):
    for name in ("model", "training/optimizer"):
        ours, theirs = (load_file(run / f"{name}.safetensors") for run in (one, other))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), key


@pytest.fixture
def late(request, monkeypatch):
    """Read outcomes while the next step runs, as on a GPU, if the test's parameter is true."""
    if request.param:
        monkeypatch.setattr(throughput, "runs_behind", lambda device: True)
    return request.param


@pytest.mark.parametrize("late", [False, True], indirect=True)
def test_a_skipped_step_is_logged_with_samples_text_and_gradients(
    settings, run, poison, tmp_path, late
):
    poison.add(2 * PER_STEP)
    events = run(settings())
    [skipped] = [event for event in events if isinstance(event, Skipped)]
    assert (skipped.step, skipped.samples) == (3, (8, 12))
    assert skipped.reason == "gradient norm is nan"
    assert skipped.same_weights == (not late)  # step 4 was taken before
    assert math.isnan(next(iter(skipped.worst_gradients.values())))
    assert "model.layers.2.mlp.down_proj.weight" in skipped.worst_gradients
    numbers = [sample["sample"] for sample in skipped.worst_samples]
    assert set(numbers) < set(range(8, 12))
    assert all("cat" in sample["text"] for sample in skipped.worst_samples)
    [row] = rows(tmp_path / "run", "skipped")
    assert row["gradient_norm"] is None  # JSON has no NaN
    assert row["loss"] == pytest.approx(skipped.loss)
    state = read_state(tmp_path / "run/checkpoints/step-000006")
    assert (state.step, state.samples, state.skipped, state.finite) == (6, 24, 1, True)


def test_a_skipped_step_equals_a_run_without_its_batch(settings, run, poison, tmp_path):
    """The reference run leaves its third batch out by hand; the learning rate is constant."""
    common = {"optimizer__schedule": "constant", "optimizer__warmup_steps": 0}
    poison.add(2 * PER_STEP)
    run(settings("poisoned", **common))
    poison.clear()
    with pytest.MonkeyPatch.context() as patch:

        class Skipping(Recorded):
            def next(self):
                if self.source.sample == 2 * PER_STEP:
                    self.source.go_to(3 * PER_STEP)
                return self.source.next()

        with_batches(patch, Skipping)
        run(settings("by-hand", train__steps=5, **common))
    assert_same_weights(
        tmp_path / "poisoned/checkpoints/step-000006", tmp_path / "by-hand/checkpoints/step-000005"
    )


@pytest.mark.parametrize(
    ("log_every", "late"), [(1, False), (1, True), (99, False)], indirect=["late"]
)
@pytest.mark.usefixtures("late")
def test_a_rollback_passes_over_the_samples_of_the_skipped_steps(
    settings, run, poison, tmp_path, log_every
):
    """Steps 5 to 7 are skipped, three in a row: the run rolls back to step 4 and continues after
    the samples of step 7, even if it reads the guard only after step 8 (log_every 99)."""
    poison.update(PER_STEP * n for n in (4, 5, 6))
    common = {"train__steps": 9, "train__checkpoint_every": 4, "train__max_skips": 3,
              "train__keep_checkpoints": 9}  # fmt: skip
    events = run(settings(**common, train__log_every=log_every, train__eval_every=99))
    [back] = [event for event in events if isinstance(event, RolledBack)]
    assert (back.from_step, back.step, back.samples, back.rollbacks) == (7, 4, (16, 28), 1)
    assert [(e.step, e.samples[0], e.same_weights) for e in events if isinstance(e, Skipped)] == [
        (5, 16, True), (6, 20, True), (7, 24, True),
    ]  # fmt: skip
    end = read_state(tmp_path / "run/checkpoints/step-000009")
    assert (end.step, end.samples, end.passed, end.skipped) == (9, 28 + 5 * 4, ((16, 28),), 0)
    # Reference: four steps, then five from their weights on the samples from 28 onwards.
    poison.clear()
    run(settings("first", **common))
    first = tmp_path / "first/checkpoints"
    for step in (8, 9):
        shutil.rmtree(first / f"step-{step:06d}")
    with pytest.MonkeyPatch.context() as patch:

        def further(source):
            source.go_to(28)
            return source

        with_batches(patch, further)
        resume(run, tmp_path / "first")
    assert_same_weights(tmp_path / "run/checkpoints/step-000009", first / "step-000009")
    steps = rows(tmp_path / "run", "step")
    assert [row["step"] for row in steps] == (list(range(1, 10)) if log_every == 1 else [9])
    assert steps[-1]["tokens"] == 9 * 128
    assert len(rows(tmp_path / "run", "skipped")) == 3


def test_a_rollback_waits_for_the_checkpoint_being_written(settings, poison, monkeypatch):
    """Writing the checkpoint of step 4 takes until 0.3 s after step 6 is skipped."""
    skipped, kinds, real = threading.Event(), [], checkpoint.write_checkpoint

    def slow(folder, contents, **options):
        assert contents.state.step != 4 or skipped.wait(20)
        return real(folder, contents, **options)

    def report(event):
        if isinstance(event, Saved | Skipped | RolledBack):
            kinds.append((type(event), event.step))
        if isinstance(event, Skipped) and event.step == 6:
            threading.Timer(0.3, skipped.set).start()

    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    poison.update(PER_STEP * n for n in (4, 5))
    train(settings(train__checkpoint_every=2, train__max_skips=2), report)
    assert kinds == [
        (Saved, 2), (Skipped, 5), (Skipped, 6), (Saved, 4), (RolledBack, 4), (Saved, 6),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "cut", [8, *(pytest.param(cut, marks=pytest.mark.slow) for cut in (2, 5, 7, 9, 12))]
)
def test_a_resumed_run_with_skipped_steps_ends_the_same(settings, run, poison, tmp_path, cut):
    """The run is killed in its cut-th attempted step; repeated steps count as well."""
    poison.update(PER_STEP * n for n in (1, 4, 5, 6))
    common = {"train__steps": 9, "train__checkpoint_every": 2, "train__max_skips": 3,
              "train__eval_every": 4}  # fmt: skip
    run(settings("straight", **common))
    real, tried = training.train_step, []

    class Killed(Exception):
        pass

    def dies(*arguments, **options):
        tried.append(1)
        if len(tried) == cut:
            raise Killed
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", dies)
        with contextlib.suppress(Killed):
            run(settings("killed", **common))
    resume(run, tmp_path / "killed")
    assert mathematics(tmp_path / "killed") == mathematics(tmp_path / "straight")
    last = "checkpoints/step-000009"
    assert_same_weights(tmp_path / "killed" / last, tmp_path / "straight" / last)
    assert (tmp_path / "killed" / last / "training/state.json").read_text() == (
        tmp_path / "straight" / last / "training/state.json"
    ).read_text()


def test_too_many_rollbacks_stop_the_run_with_the_reason(settings, run, poison, tmp_path):
    poison.update(PER_STEP * n for n in range(4, 99))
    config = settings(
        train__steps=20, train__checkpoint_every=1, train__max_skips=2, train__max_rollbacks=2,
        train__keep_checkpoints=9,
    )  # fmt: skip
    with pytest.raises(PretrainError, match=r"training diverged: 2 steps .* it went back 2 times"):
        run(config)
    backs = rows(tmp_path / "run", "rollback")
    assert [row["step"] for row in backs] == [4, 3]  # every step from 4 was skipped
    assert [row["samples"] for row in backs] == [[16, 24], [12, 32]]
    for path in retention.checkpoints(tmp_path / "run"):
        assert read_state(path).step <= 5
        for name in ("model", "training/optimizer"):
            assert all(t.isfinite().all() for t in load_file(path / f"{name}.safetensors").values())


def test_a_rollback_without_a_checkpoint_ends_the_run(settings, run, poison):
    poison.update(PER_STEP * n for n in range(99))
    with pytest.raises(PretrainError, match="no earlier checkpoint to go back to"):
        run(settings(train__steps=20, train__max_skips=2))


def test_weights_that_are_not_finite_are_not_saved(settings, run, tmp_path, monkeypatch):
    """A weight becomes infinite in a step of finite loss and gradients: the run rolls back."""
    real, done = training.train_step, []

    def breaks(job, *arguments, **options):
        result = real(job, *arguments, **options)
        done.append(1)
        if len(done) == 4:
            with torch.no_grad():
                next(job.model.parameters())[0, 0] = math.inf
        return result

    monkeypatch.setattr(training, "train_step", breaks)
    events = run(settings(train__checkpoint_every=2))
    [back] = [event for event in events if isinstance(event, RolledBack)]
    assert (back.step, back.from_step) == (2, 4)
    assert "not finite" in back.reason
    for path in retention.checkpoints(tmp_path / "run"):
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())
    assert [e.step for e in events if isinstance(e, StepMetrics)] == [1, 2, 3, 4, 3, 4, 5, 6]


def test_token_counts_of_sources_leave_out_skipped_samples(
    settings, run, poison, dataset, other_dataset, tmp_path
):
    poison.update((12, 16))
    path = [f"{dataset}:0.7", f"{other_dataset}:0.3"]
    run(settings(data__path=path, train__checkpoint_every=2, train__max_skips=2))
    last = rows(tmp_path / "run", "step")[-1]
    assert sum(last["sources"].values()) == last["tokens"] == 6 * 128


def test_skipped_steps_and_rollbacks_are_displayed(capsys):
    display = TrainDisplay()
    display(Skipped(3, "loss is nan", math.nan, 1.0, (8, 12), [], {"lm_head.weight": 9.0}, True, 0))
    display(RolledBack(2, 7, "3 steps in a row were skipped", (8, 28), 1))
    shown = capsys.readouterr().out
    assert (
        "step 3 skipped: loss is nan (samples 8 to 11; largest gradient: lm_head.weight)" in shown
    )
    sentence = "Rolled back from step 7 to 2: 3 steps in a row were skipped."
    assert f"{sentence} Samples 8 to 27 are skipped\n" in shown


def test_tensorboard_drops_the_steps_that_a_rollback_repeats(settings, run, poison, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    poison.update(PER_STEP * n for n in (4, 5))
    run(settings(train__checkpoint_every=3, train__max_skips=2, train__log="tensorboard"))
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [each.step for each in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


TWO_RANKS = """
import dataclasses, math
from pretrain_cli.engine.training import train as training

set_up = training.set_up

def spoilt_job(plan, ranks, *arguments, **options):
    job = set_up(plan, ranks, *arguments, **options)
    source, real = Recorded(job.batches), job.decoder.forward
    def forward(*arguments, **options):
        parts = real(*arguments, **options)
        spoilt = source.current in (16, 20) and ranks.rank == 1
        factor = math.nan if spoilt else 1.0
        return parts._replace(
            minimized=parts.minimized * factor, cross_entropy=parts.cross_entropy * factor
        )
    job.decoder.forward = forward
    return dataclasses.replace(job, batches=source)

training.set_up = spoilt_job
from pretrain_cli.cli import app
app()
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_skip_and_roll_back_together(settings, tmp_path, parallel):
    """In steps 5 and 6, one of two ranks has a NaN loss."""
    config = settings(
        train__steps=7, train__checkpoint_every=3, train__max_skips=2, train__eval_every=99
    )
    flags = [
        f"--set={section}.{name}={value}"
        for section, values in config.model_dump(mode="json", exclude_unset=True).items()
        for name, value in values.items()
        if (section, name) != ("train", "parallel")
    ]
    script = tmp_path / "spoilt.py"
    script.write_text(inspect.getsource(Recorded) + TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script), "train",
               *flags, f"--set=train.parallel={parallel}"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    skipped = rows(tmp_path / "run", "skipped")
    assert [(row["step"], row["samples"]) for row in skipped] == [(5, [16, 20]), (6, [20, 24])]
    assert {sample["sample"] for sample in skipped[0]["worst_samples"]} > {18, 19}  # of rank 1
    [back] = rows(tmp_path / "run", "rollback")
    assert (back["step"], back["samples"]) == (3, [12, 24])
    steps = rows(tmp_path / "run", "step")
    assert [row["step"] for row in steps] == list(range(1, 8))
    assert all(row["loss"] is not None for row in steps)
    end = load_file(tmp_path / "run/checkpoints/step-000007/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in end.values())
