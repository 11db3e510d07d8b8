"""`pretrain evaluate`: the same loss as the run's validation, on other datasets and checkpoints."""

import json
import math
import shutil
from pathlib import Path

import pytest

CHECKPOINT = "runs/tiny/checkpoints/step-000060"
NUMBERS = ("loss", "perplexity", "bits_per_byte", "tokens")


@pytest.fixture
def birds(trained, pretrain):
    """Dataset other than the run's, from the same tokenizer."""
    Path("birds").mkdir()
    for number in range(20):
        Path(f"birds/{number}.txt").write_text(f"{number} birds sing" * (number + 1))
    assert pretrain("tokenize --tokenizer bytes --val-fraction 0.3 birds").code == 0
    return Path("data/birds")


def evaluated(pretrain, line):
    outcome = pretrain(f"evaluate {line} --json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@pytest.mark.usefixtures("trained")
def test_evaluate_gives_the_validation_loss_of_the_run(pretrain):
    rows = map(json.loads, Path("runs/tiny/metrics.jsonl").read_text().splitlines())
    measured = {row["step"]: row for row in rows if row["kind"] == "evaluation"}[60]
    result = evaluated(pretrain, "")
    assert result["checkpoint"] == CHECKPOINT
    assert (result["seq_len"], result["dtype"]) == (32, "float32")
    assert result["tokens"] == measured["tokens"]
    for name in ("loss", "bits_per_byte"):
        assert result[name] == pytest.approx(measured[name], rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(measured["loss"]))


@pytest.mark.usefixtures("trained")
def test_a_run_a_checkpoint_and_a_model_folder_have_the_same_loss(pretrain):
    shutil.copytree(CHECKPOINT, "elsewhere")
    shutil.rmtree("elsewhere/training")  # a Hugging Face folder has none
    lines = (
        "",
        "runs/tiny",
        CHECKPOINT,
        "elsewhere --data data/corpus --seq-len 32 --dtype float32",
    )
    found = [[evaluated(pretrain, line)[name] for name in NUMBERS] for line in lines]
    assert found == [found[0]] * 4
    older = evaluated(pretrain, "runs/tiny/checkpoints/step-000040")
    assert older["loss"] != found[0][0]


@pytest.mark.usefixtures("trained")
def test_best_selects_the_checkpoint_with_the_lowest_validation_loss(pretrain, refused):
    """Train a run that diverges: good initial weights, and a learning rate that grows too high."""
    done = pretrain(
        f"train --init-from {CHECKPOINT} --seq-len 32 --tokens-per-step 128 --micro-batch-size 2 "
        "--dtype float32 --steps 4 --optimizer adamw --learning-rate 0.3 --keep 1 --out worse "
        "--set optimizer.embedding_rate_scale=1 --set optimizer.warmup_steps=6 "
        "--set train.eval_every=2 --set train.checkpoint_every=2"
    )
    assert done.code == 0, done.err
    rows = map(json.loads, Path("worse/metrics.jsonl").read_text().splitlines())
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "evaluation"}
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert best != 4
    result = evaluated(pretrain, "worse --best")
    assert result["checkpoint"] == f"worse/checkpoints/step-{best:06d}"
    assert result["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert evaluated(pretrain, "worse")["checkpoint"] == "worse/checkpoints/step-000004"
    assert refused(f"evaluate {CHECKPOINT} --best").startswith(f"--best: {CHECKPOINT} is one model")


def test_options_reach_the_evaluation(pretrain, birds):
    line = f"--data data/corpus --data {birds} --eval-tokens 50 --document-mask --attn eager"
    result = evaluated(pretrain, f"{line} --seq-len 16")
    assert (result["document_mask"], result["attention"], result["seq_len"]) == (True, "eager", 16)
    assert {name: part["tokens"] for name, part in result["sources"].items()} == {
        "data/corpus": 50, "data/birds": 50,
    }  # fmt: skip


@pytest.mark.usefixtures("trained")
def test_without_json_a_table_is_printed(pretrain, birds):
    outcome = pretrain("evaluate --data data/corpus --data data/birds")
    assert outcome.code == 0, outcome.err
    result = evaluated(pretrain, "--data data/corpus --data data/birds")
    for part in (result, *result["sources"].values()):
        assert f"{part['loss']:.4f}" in outcome.out
        assert f"{part['bits_per_byte']:.4f}" in outcome.out
    assert str(birds) in outcome.out


@pytest.mark.usefixtures("trained")
def test_another_tokenizers_dataset_is_refused(pretrain, refused):
    assert pretrain("tokenize --tokenizer bpe --vocab-size 300 --out data/other corpus").code == 0
    message = refused(f"evaluate {CHECKPOINT} --data data/other")
    assert message.startswith("data/other: made with the tokenizer bpe-300, and runs/tiny/")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nowhere", "nowhere: no such run, checkpoint or model folder"),
        ("--data nowhere", "nowhere: no such dataset"),
        ("--eval-tokens 0", "--eval-tokens: 0 is not at least 1"),
        ("--seq-len 0", "--seq-len: 0 is not at least 1"),
        ("--seq-len 4096", "--seq-len: 4,096 is beyond the model's 2,048 positions"),
        ("--attn fast", "speed.attention: 'fast' is not one of"),
        ("--device gpu", "train.device: 'gpu' is not a device"),
    ],
)
def test_invalid_evaluate_arguments_are_refused(refused, line, said):
    assert refused(f"evaluate {line}").startswith(said)


@pytest.mark.usefixtures("trained")
def test_a_model_folder_without_a_run_needs_a_dataset(refused):
    shutil.copytree(CHECKPOINT, "elsewhere")
    assert "elsewhere belongs to no run" in refused("evaluate elsewhere")


@pytest.mark.usefixtures("trained")
def test_a_dataset_without_a_validation_split_is_refused(pretrain, refused):
    assert pretrain("tokenize --tokenizer bytes --val-fraction 0 --out data/all corpus").code == 0
    message = refused(f"evaluate {CHECKPOINT} --data data/all")
    assert message.startswith("data/all: no validation split")
