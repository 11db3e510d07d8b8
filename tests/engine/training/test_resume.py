"""Exact resume: an interrupted run ends as the uninterrupted one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain_cli.config.build import build_config
from pretrain_cli.engine.runs import retention
from pretrain_cli.engine.runs.events import Notice
from pretrain_cli.engine.runs.run_yaml import read_record, resumed_settings
from pretrain_cli.errors import CheckpointError, ConfigError, DataError, PretrainError

NUMBERS = ("step", "loss", "learning_rate", "gradient_norm", "tokens", "bits_per_byte", "sources")


def numbers(run: Path) -> list[dict]:
    """Return the numbers of a metrics file that must repeat: everything but starts, saves, times
    and memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] not in ("start", "saved")]
    return [{key: row[key] for key in ("kind", *NUMBERS) if key in row} for row in rows]


def resume(run_it, folder: Path, **changes):
    record = read_record(folder)
    flags = {name.replace("__", "."): value for name, value in changes.items()}
    allow = flags.pop("allow_change", False)
    changed = build_config(record.settings, flags, [])
    settings = resumed_settings(record, changed, allow_change=allow)
    return run_it(settings, resume=(folder, record))


def assert_same_weights(one: Path, other: Path, files=("model", "training/optimizer")) -> None:
    for name in files:
        ours, theirs = (
            load_file(one / f"{name}.safetensors"),
            load_file(other / f"{name}.safetensors"),
        )
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("model", ["gemma3-tiny", "qwen3-tiny"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"speed__dtype": "bfloat16"},
        {"data__document_mask": True},
        {"optimizer__name": "muon", "optimizer__schedule": "wsd-sqrt"},
    ],
    ids=str,
)
def test_resuming_gives_the_same_losses_and_weights(settings, run, tmp_path, model, changes):
    common = {"model__name": model, "train__eval_every": 3, **changes}
    run(settings("straight", **common))
    # The first half is steps 1 to 3 of a run whose schedule has six steps.
    run(settings("halves", train__checkpoint_every=3, **common))
    later = tmp_path / "halves/checkpoints/step-000006"
    for path in sorted(later.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    later.rmdir()
    resume(run, tmp_path / "halves")
    assert numbers(tmp_path / "halves") == numbers(tmp_path / "straight")
    assert_same_weights(later, tmp_path / "straight/checkpoints/step-000006")


@pytest.mark.parametrize("stops", [3, 4])
@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_a_run_resumes_before_and_at_the_beginning_of_a_stage(
    settings, run, tmp_path, dataset, other_dataset, packing, stops
):
    """From step 4 on there is another mixture, in samples twice as long."""
    stage = {"after": 4 * 128, "path": [f"{dataset}:1", f"{other_dataset}:3"], "seq_len": 64}
    common = {"data__stages": [stage], "data__packing": packing, "train__steps": 8}
    run(settings("straight", train__checkpoint_every=8, **common))
    run(settings("halves", train__checkpoint_every=stops, train__keep_checkpoints=9, **common))
    checkpoints = tmp_path / "halves/checkpoints"
    for path in sorted(checkpoints.glob("step-*"))[1:]:
        shutil.rmtree(path)
    assert [path.name for path in checkpoints.glob("step-*")] == [f"step-{stops:06}"]
    resume(run, tmp_path / "halves")
    assert numbers(tmp_path / "halves") == numbers(tmp_path / "straight")
    last = "checkpoints/step-000008"
    assert_same_weights(tmp_path / "halves" / last, tmp_path / "straight" / last)
    rows = [row for row in numbers(tmp_path / "straight") if row["kind"] == "step"]
    assert [row["tokens"] for row in rows] == [128 * step for step in range(1, 9)]
    assert rows[3]["sources"] == {str(dataset): 512, str(other_dataset): 0}
    assert rows[7]["sources"] == {str(dataset): 640, str(other_dataset): 384}


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_resuming_a_mixture_continues_each_sources_epoch(
    settings, run, tmp_path, dataset, other_dataset, packing
):
    common = {
        "data__path": [f"{dataset}:0.7", f"{other_dataset}:0.3"],
        "data__packing": packing,
        "train__eval_every": 3,
    }
    run(settings("straight", **common))
    run(settings("cut", train__checkpoint_every=2, train__keep_checkpoints=9, **common))
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"cut/checkpoints/step-{step:06d}")
    resume(run, tmp_path / "cut")
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "straight")
    last = "checkpoints/step-000006"
    assert_same_weights(tmp_path / "cut" / last, tmp_path / "straight" / last)


def test_resuming_with_other_speed_settings_keeps_the_moments(settings, run, tmp_path):
    run(settings("straight"))
    run(settings("changed", train__checkpoint_every=3, train__keep_checkpoints=5))
    (tmp_path / "changed/checkpoints/step-000006").rename(tmp_path / "aside")
    resume(run, tmp_path / "changed", speed__merged_qkv=False, speed__attention="eager",
           train__micro_batch_size=1)  # fmt: skip
    ours, theirs = numbers(tmp_path / "changed"), numbers(tmp_path / "straight")
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert json.loads((tmp_path / "changed/metrics.jsonl").read_text().splitlines()[-1])


def test_more_steps_continue_a_finished_run(settings, run, tmp_path):
    run(settings(train__steps=3))
    resume(run, tmp_path / "run", train__steps=5)
    assert [row["step"] for row in numbers(tmp_path / "run") if row["kind"] == "step"] == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip


def test_resuming_a_finished_run_gives_a_notice_and_adds_nothing(settings, run, tmp_path):
    run(settings(train__steps=2))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    events = resume(run, tmp_path / "run")
    assert any("has its 2 steps" in event.text for event in events if isinstance(event, Notice))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert len((tmp_path / "run/samples.jsonl").read_text().splitlines()) == 1


def test_a_damaged_checkpoint_is_named_and_an_older_one_used(settings, run, tmp_path):
    run(settings(train__checkpoint_every=2, train__keep_checkpoints=3))
    weights = tmp_path / "run/checkpoints/step-000006/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = numbers(tmp_path / "run")
    events = resume(run, tmp_path / "run")
    assert any("step-000006" in e.text for e in events if isinstance(e, Notice))
    assert numbers(tmp_path / "run") == before


def test_a_run_with_only_damaged_checkpoints_is_not_started_over(settings, run, tmp_path):
    run(settings())
    state = tmp_path / "run/checkpoints/step-000006/training/state.json"
    state.write_text(state.read_text().replace("6", "7"))
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints"):
        resume(run, tmp_path / "run")


def test_a_run_killed_before_its_first_checkpoint_starts_again(settings, run, tmp_path):
    run(settings("straight"))
    run(settings("killed"))
    (tmp_path / "killed/checkpoints/step-000006").rename(tmp_path / "gone")
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # cut short by the kill
    resume(run, tmp_path / "killed")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "straight")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("optimizer.learning_rate", 1.0), ("train.seed", 5), ("data.seq_len", 16),
     ("model.hidden_size", 64), ("train.tokens_per_step", 256), ("data.document_mask", True),
     ("data.packing", "best-fit")],
)  # fmt: skip
def test_resume_refuses_settings_that_change_the_losses(settings, run, tmp_path, setting, value):
    run(settings(train__steps=1))
    with pytest.raises(ConfigError, match=f"{setting}: {value} differs"):
        resume(run, tmp_path / "run", **{setting: value})


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [("optimizer.learning_rate", 1e-4, True), ("optimizer.schedule", "cosine", True),
     ("optimizer.clip", 0.5, True), ("data.document_mask", True, True),
     ("train.tokens_per_step", 256, True), ("optimizer.name", "muon", False),
     ("train.seed", 5, False), ("data.seq_len", 16, False), ("model.hidden_size", 64, False)],
)  # fmt: skip
def test_resume_allows_a_new_learning_rate_and_refuses_a_new_model(
    settings, run, tmp_path, setting, value, allowed
):
    run(settings(train__steps=1))
    changes = {setting: value, "train.steps": 2, "allow_change": True}
    if not allowed:
        with pytest.raises(ConfigError, match=f"{setting}: {value} differs .* keeps it: "):
            resume(run, tmp_path / "run", **changes)
        return
    with pytest.raises(ConfigError, match="To do it anyway, add --allow-change"):
        resume(run, tmp_path / "run", **changes | {"allow_change": False})
    events = resume(run, tmp_path / "run", **changes)
    told = [event.text for event in events if isinstance(event, Notice)]
    [line] = [text for text in told if text.startswith(f"{setting}: ")]
    assert line.endswith(f" → {value}")
    assert "train.steps: 1 → 2" in told
    assert events[-1].step == 2


def test_another_dataset_is_refused_on_resume(settings, run, tmp_path, dataset):
    from pretrain_cli.data.tokenizing.tokenize import TokenizeRequest, tokenize

    (tmp_path / "dogs.txt").write_text("a dog, another dog, " * 200)
    other = TokenizeRequest(
        paths=(str(tmp_path / "dogs.txt"),), out=tmp_path / "dogs", tokenizer="bytes"
    )
    tokenize(other, lambda *_: None)
    run(settings(train__steps=1))
    for path in (tmp_path / "dogs", [dataset, tmp_path / "dogs"]):
        with pytest.raises(DataError, match="not the dataset"):
            resume(run, tmp_path / "run", data__path=path, train__steps=2)


def test_a_mixture_is_resumed_only_with_the_same_proportions(
    settings, run, tmp_path, dataset, other_dataset
):
    run(settings(data__path=[f"{dataset}:2", f"{other_dataset}:1"], train__steps=1))
    moved = tmp_path / "moved"
    shutil.copytree(other_dataset, moved)
    for weights in ((1, 2), (1, 1)):
        path = [f"{folder}:{w}" for folder, w in zip((dataset, moved), weights, strict=True)]
        with pytest.raises(DataError, match=r"not the dataset .*give .*:2 .*:1 with --data"):
            resume(run, tmp_path / "run", data__path=path, train__steps=2)
    path = [f"{dataset}:0.5", f"{moved}:0.25"]  # in the same proportion
    assert resume(run, tmp_path / "run", data__path=path, train__steps=2)[-1].step == 2


def test_resuming_an_earlier_checkpoint_renames_later_ones(settings, run, tmp_path):
    run(settings("straight", train__steps=4, train__checkpoint_every=1, train__keep_checkpoints=9))
    folder = tmp_path / "straight"
    before = numbers(folder)
    record = read_record(folder)
    early = folder / "checkpoints/step-000002"
    events = run(resumed_settings(record, build_config(record.settings, {"train.steps": 3}, [])),
                 resume=(folder, record), resume_from=early)  # fmt: skip
    assert any("step-000004: beyond step 2" in e.text for e in events if isinstance(e, Notice))
    assert [path.name for path in retention.checkpoints(folder)] == [
        "step-000003", "step-000002", "step-000001",
    ]  # fmt: skip
    resume(run, folder, train__steps=4)
    steps = [row for row in numbers(folder) if row["kind"] == "step"]
    # More steps change the schedule's rates; a rate shows only in the loss of the next step.
    assert [row["loss"] for row in steps[:3]] == [
        row["loss"] for row in before if row["kind"] == "step"
    ][:3]


def test_the_newest_checkpoint_has_the_highest_step(tmp_path):
    for step in (999_900, 1_000_000, 999_950):
        (tmp_path / f"checkpoints/step-{step:06d}").mkdir(parents=True)
    assert [retention.step_of(path) for path in retention.checkpoints(tmp_path)] == [
        1_000_000, 999_950, 999_900,
    ]  # fmt: skip


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(settings, run, tmp_path):
    config = settings(train__steps=40, train__checkpoint_every=1, optimizer__learning_rate=1e30)
    with pytest.raises(PretrainError, match="training diverged"):
        run(config)
    for path in retention.checkpoints(tmp_path / "run"):
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_one_rank_resumes_on_two(settings, run, tmp_path, parallel):
    """The checkpoint is that of one rank; the losses are the same."""
    run(settings("straight"))
    run(settings("two", train__checkpoint_every=3, train__keep_checkpoints=5))
    (tmp_path / "two/checkpoints/step-000006").rename(tmp_path / "gone")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "pretrain_cli", "train",
               f"--resume={tmp_path / 'two'}", "--micro-batch-size=1",
               f"--set=train.parallel={parallel}"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, other in zip(numbers(tmp_path / "two"), numbers(tmp_path / "straight"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)
    names = {"model", "training/optimizer"}
    for name in names:
        saved = load_file(tmp_path / f"two/checkpoints/step-000006/{name}.safetensors")
        alone = load_file(tmp_path / f"straight/checkpoints/step-000006/{name}.safetensors")
        assert saved.keys() == alone.keys()
