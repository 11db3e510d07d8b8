"""`pretrain evaluate`: the run's own validation, on any checkpoint and any dataset."""

import importlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pretrain_cli.data.dataset import open_dataset

CHECKPOINT = "runs/tiny/checkpoints/step-000060"
NUMBERS = ("loss", "perplexity", "bits_per_byte", "tokens")


def evaluated(pretrain, line):
    outcome = pretrain(f"evaluate {line} --json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@pytest.fixture
def birds(trained, pretrain):
    """A second dataset of the same tokenizer."""
    Path("birds").mkdir()
    for number in range(20):
        Path(f"birds/{number}.txt").write_text(f"{number} birds sing" * (number + 1))
    assert pretrain("tokenize --tokenizer bytes --val-fraction 0.3 birds").code == 0
    return Path("data/birds")


def plainly(folder, dataset, targets=None):
    """(nats, targets, bytes) of a validation split: transformers' model, window by window. Of bytes
    as tokens, all but the end of a document are of the text."""
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = open_dataset(dataset).val.tokens
    ids = torch.from_numpy(tokens.read(0, len(tokens) if targets is None else targets + 1))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            logits = model(window[None, :-1]).logits[0]
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total, len(ids) - 1, int((ids < 256).sum())


@pytest.mark.usefixtures("trained")
def test_a_checkpoint_has_the_loss_that_its_run_measured(pretrain):
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
    shutil.rmtree("elsewhere/training")  # what a Hugging Face folder does not have
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
def test_the_best_checkpoint_is_the_one_of_lowest_validation_loss(pretrain, refused):
    """The run gets worse: good weights, and a learning rate that grows too high."""
    done = pretrain(
        f"train --init-from {CHECKPOINT} --seq-len 32 --tokens-per-step 128 --micro-batch-size 2 "
        "--dtype float32 --steps 4 --learning-rate 0.3 --keep 1 --out worse "
        "--set optimizer.warmup_steps=6 --set train.eval_every=2 --set train.checkpoint_every=2"
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


def test_the_loss_is_that_of_transformers_dataset_by_dataset(pretrain, birds):
    result = evaluated(pretrain, "--data data/corpus --data data/birds")
    sums = {name: plainly(CHECKPOINT, Path(name)) for name in ("data/corpus", str(birds))}
    sums["all"] = tuple(map(sum, zip(*sums.values(), strict=True)))
    for name, (nats, targets, size) in sums.items():
        part = result if name == "all" else result["sources"][name]
        assert part["tokens"] == targets
        assert part["loss"] == pytest.approx(nats / targets, rel=1e-5)
        assert part["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_so_many_tokens_are_the_first_ones_of_each_dataset(pretrain, birds):
    result = evaluated(pretrain, "--data data/corpus --data data/birds --eval-tokens 100")
    for name in ("data/corpus", str(birds)):
        nats, targets, size = plainly(CHECKPOINT, Path(name), 100)
        part = result["sources"][name]
        assert part["tokens"] == targets == 100
        assert part["loss"] == pytest.approx(nats / 100, rel=1e-5)
        assert part["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert evaluated(pretrain, "--eval-tokens 1000000") == evaluated(pretrain, "")


def test_documents_are_masked_where_that_is_asked_for(pretrain, birds):
    plain = evaluated(pretrain, f"--data {birds}")
    masked = evaluated(pretrain, f"--data {birds} --document-mask --attn eager")
    assert (plain["document_mask"], masked["document_mask"]) == (False, True)
    assert masked["tokens"] == plain["tokens"]
    assert masked["loss"] != pytest.approx(plain["loss"], rel=1e-5)


@pytest.mark.usefixtures("trained")
def test_a_person_is_shown_a_table(pretrain, birds):
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
def test_what_can_not_be_evaluated_is_refused(refused, line, said):
    assert refused(f"evaluate {line}").startswith(said)


@pytest.mark.usefixtures("trained")
def test_a_folder_of_no_run_needs_a_dataset(refused):
    shutil.copytree(CHECKPOINT, "elsewhere")
    assert "elsewhere belongs to no run" in refused("evaluate elsewhere")


@pytest.mark.usefixtures("trained")
def test_a_dataset_without_a_validation_split_is_refused(pretrain, refused):
    assert pretrain("tokenize --tokenizer bytes --val-fraction 0 --out data/all corpus").code == 0
    message = refused(f"evaluate {CHECKPOINT} --data data/all")
    assert message.startswith("data/all: no validation split")
