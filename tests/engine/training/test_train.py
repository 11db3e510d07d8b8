"""Training runs: the logged loss, events, learning, and two ranks."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.runs.events import Evaluation, Finished, Notice, Sample, Saved, StepMetrics
from pretrain_cli.engine.runtime.speed import build_model, resolve_speed
from pretrain_cli.engine.training import train as training
from pretrain_cli.model.config import variant
from pretrain_cli.model.presets import preset
from pretrain_cli.targets import IGNORE_INDEX

CPU = torch.device("cpu")


def small_model(name: str = "gemma3-tiny", **speed):
    config = variant(
        preset(name),
        {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "vocab_size": 64},
    )
    settled = resolve_speed(SpeedConfig(**{"dtype": "float32", **speed}), CPU)
    model = build_model(config, settled, CPU)
    model.initialize(1)
    return model


def losses(events):
    return [event.loss for event in events if isinstance(event, StepMetrics)]


def test_a_run_on_packed_documents_leaves_padding_out_of_its_loss(settings, run, monkeypatch):
    real, steps = training.train_step, []

    def spied(job, batch, *rest, **options):
        logits, targets = job.model(batch.inputs).flatten(0, 1), batch.targets
        mean = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX).item()
        steps.append((int((targets == IGNORE_INDEX).sum()), mean))
        return real(job, batch, *rest, **options)

    monkeypatch.setattr(training, "train_step", spied)
    events = run(settings(train__steps=6, data__packing="best-fit"))
    padding, means = zip(*steps, strict=True)
    assert sum(padding) > 6
    assert losses(events) == pytest.approx(means, rel=1e-5)


def test_a_run_reports_saves_evaluates_and_samples(settings, run, tmp_path):
    events = run(settings(train__steps=4, train__checkpoint_every=2, train__eval_every=2))
    assert [e.step for e in events if isinstance(e, StepMetrics)] == [1, 2, 3, 4]
    assert [e.step for e in events if isinstance(e, Evaluation)] == [2, 4]
    assert [e.step for e in events if isinstance(e, Saved)] == [2, 4]
    assert [e.step for e in events if isinstance(e, Sample)] == [4]
    assert events[-1] == Finished(tmp_path / "run", 4, 4, "done")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] != "saved"]  # saves are logged asynchronously
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("start", 0), ("step", 1), ("step", 2), ("evaluation", 2), ("step", 3), ("step", 4),
        ("evaluation", 4),
    ]  # fmt: skip
    assert rows[1]["tokens"] == 128
    assert rows[-2]["tokens"] == 4 * 128
    assert (tmp_path / "run/samples.jsonl").is_file()


def test_training_on_cats_soon_beats_chance(settings, run):
    events = run(settings(train__steps=100, train__eval_every=100))
    before, after = losses(events)[0], losses(events)[-1]
    assert before == pytest.approx(math.log(320), abs=0.3)
    assert after < 2.0
    [evaluation] = [event for event in events if isinstance(event, Evaluation)]
    assert evaluation.loss < 2.5


def test_only_the_newest_checkpoints_are_kept(settings, run, tmp_path):
    run(settings(train__checkpoint_every=1, train__keep_checkpoints=2))
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-000005", "step-000006"]


def test_automatic_choices_are_reported(settings, run):
    config = settings(train__steps="auto", train__tokens=None, data__seq_len="auto",
                      train__tokens_per_step="auto", speed__float32_matmul="high")  # fmt: skip
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"steps": 1, "sample_tokens": 0})}
    )
    told = [event.text for event in run(config) if isinstance(event, Notice)]
    assert any("Vocabulary 320 instead of the model's 4,096" in text for text in told)
    assert any("speed.float32_matmul: highest" in text for text in told)


@pytest.mark.parametrize(
    ("parallel", "packing", "dtype", "tolerance"),
    [
        ("ddp", "best-fit", "float32", 2e-5),
        ("fsdp", "concat", "float32", 2e-5),
        ("fsdp", "concat", "bfloat16", 1e-3),
    ],
)
def test_two_ranks_train_as_one_with_the_same_batch(
    settings, run, tmp_path, dataset, other_dataset, parallel, packing, dtype, tolerance
):
    """Two gloo processes on a CPU, the same global batch: the same losses and validation."""
    shutil.copytree(dataset, tmp_path / "cats")  # a copy without an index of packed documents
    path = [f"{tmp_path / 'cats'}:0.6", f"{other_dataset}:0.4"]
    config = settings(
        "alone",
        train__steps=4,
        train__eval_every=2,
        data__path=path,
        data__packing=packing,
        data__document_mask=True,
        speed__dtype=dtype,
    )
    alone = run(config)
    for index in (tmp_path / "cats").glob("packing-*"):
        index.unlink()  # the ranks build it again
    flags = [
        f"--set={section}.{name}={value}"
        for section, values in config.model_dump(mode="json", exclude_unset=True).items()
        for name, value in values.items()
        if (section, name) not in {("train", "out"), ("train", "parallel")}
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
               "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
               "-m", "pretrain_cli", "train", *flags,
               f"--out={tmp_path / 'two'}", f"--set=train.parallel={parallel}"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    steps = [row["loss"] for row in rows if row["kind"] == "step"]
    assert steps == pytest.approx(losses(alone), rel=tolerance)
    norms = [row["gradient_norm"] for row in rows if row["kind"] == "step"]
    expected = [event.gradient_norm for event in alone if isinstance(event, StepMetrics)]
    assert norms == pytest.approx(expected, rel=5 * tolerance)
    evaluated = [(row["loss"], row["tokens"]) for row in rows if row["kind"] == "evaluation"]
    for (loss, tokens), event in zip(
        evaluated, [e for e in alone if isinstance(e, Evaluation)], strict=True
    ):
        assert tokens == event.tokens
        assert loss == pytest.approx(event.loss, rel=tolerance)
