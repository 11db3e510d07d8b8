"""`pretrain benchmark --find-micro-batch`: found, stored, and used by training."""

import json
from pathlib import Path

import pytest
import torch

from pretrain_cli.engine.benchmark import search, timing
from pretrain_cli.engine.planning import micro_batch
from tests.commands.benchmark import test_command
from tests.commands.benchmark.test_command import MODEL

here = test_command.here  # a fixture


@pytest.fixture
def room(monkeypatch):
    """Allow 20 GB, enough for a process that has loaded all the tests, and 0.05 s per step."""
    monkeypatch.setattr(micro_batch, "memory_here", lambda device: 20 * 10**9)
    monkeypatch.setattr(search, "LONGEST", 0.05)


@pytest.mark.usefixtures("here", "room", "trained")
def test_training_uses_the_micro_batch_that_the_search_found(pretrain):
    model = MODEL.replace("vocab_size=512", "vocab_size=320")  # the dataset's vocabulary
    line = f"benchmark --find-micro-batch {model} --seq-len 32 --dtype float32 --device cpu"
    outcome = pretrain(f"{line} --rounds 2 --steps 2 --warmup 1 --json found.json")
    assert outcome.code == 0, outcome.err
    found = json.loads(Path("found.json").read_text())["micro_batch"]
    rates = {int(size): rate for size, rate in found["tokens_per_second"].items()}
    assert {1, 2, 4} <= set(rates)
    assert rates[found["fastest"]] >= 0.98 * max(rates.values())
    assert found["largest"] == max(rates)
    assert "Fastest: micro-batch " in outcome.out
    assert "Largest: micro-batch " in outcome.out
    assert "Kept in runs/micro-batches.json: pretrain train takes the fastest that" in outcome.out

    tiny = "train --model gemma3-tiny " + model.partition(" ")[2].partition(" ")[2]
    line = f"{tiny} --seq-len 32 --dtype float32 --tokens-per-step 1024 --steps 1 --out fast"
    outcome = pretrain(f"{line} --micro-batch-size auto --data data/corpus")
    assert outcome.code == 0, outcome.err
    assert "(the fastest measured here)" in outcome.out


def test_a_machine_without_memory_for_one_sample_is_refused(refused, monkeypatch):
    monkeypatch.setattr(micro_batch, "memory_here", lambda device: 1_500_000)
    said = refused(f"benchmark --find-micro-batch {MODEL} --seq-len 32 --device cpu")
    assert said.startswith("--find-micro-batch: a micro-batch of 1 takes about 33")
    assert said.endswith(", and 1.5 MB may be used; give a smaller model, or --seq-len")


@pytest.mark.usefixtures("here", "room")
def test_a_search_without_a_measurement_exits_1_and_stores_nothing(pretrain, monkeypatch):
    def broken(arm, repeats):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing, "measure_round", broken)
    outcome = pretrain(f"benchmark --find-micro-batch {MODEL} --seq-len 32 --device cpu")
    assert outcome.code == 1
    assert "micro-batch 1: not run: out of memory" in outcome.out
    assert not Path("runs").exists()
