"""`.tools/race` on two tiny recipes: what it writes, and what it does not run again."""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / ".tools" / "race"


@pytest.fixture(scope="module")
def race():
    loader = importlib.machinery.SourceFileLoader("race", str(TOOL))
    spec = importlib.util.spec_from_loader("race", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_tokens_to_a_loss_are_between_two_evaluations(race):
    curve = {"tokens": [10, 20, 30], "seconds": [1.0, 2.0, 4.0], "loss": [5.0, 4.0, 3.0]}
    assert race.reaching(curve, 3.5, "tokens") == 25
    assert race.reaching(curve, 3.5, "seconds") == 3.0
    assert race.reaching(curve, 6.0, "tokens") == 10
    assert race.reaching(curve, 2.9, "tokens") is None


def test_ratios_are_taken_seed_by_seed(race):
    slow = {"tokens": [10, 20], "seconds": [1.0, 2.0], "loss": [5.0, 4.0]}
    fast = {"tokens": [10, 20], "seconds": [2.0, 4.0], "loss": [4.0, 3.0]}
    never = {"tokens": [10, 20], "seconds": [2.0, 4.0], "loss": [6.0, 5.0]}
    record = {
        "model": "m",
        "reference": "slow",
        "recipes": {"slow": [slow, slow], "fast": [fast, never]},
    }
    lines = list(race.table_of(record))
    assert lines[2] == "| slow | 4.000 ± 0.000 | 1.00 ± 0.00 | 1.00 ± 0.00 |"
    assert lines[3] == "| fast | 4.000 ± 1.414 | 0.50 (1 of 2 never) | 1.00 (1 of 2 never) |"


def test_a_race_compares_recipes_and_goes_on_where_it_was(pretrain, corpus):
    assert pretrain(f"tokenize --tokenizer bytes {corpus} --out data/bytes").code == 0
    changed = "auto,optimizer.betas=[0.8,0.9],optimizer.learning_rate=0.5"
    command = [
        *(sys.executable, TOOL, "nanogpt", changed, "--data", "data/bytes", "--out", "race"),
        *("--tokens", "1k", "--tokens-per-step", "64", "--seq-len", "32", "--seeds", "2"),
        *("--set", "model.hidden_size=32", "--set", "model.num_hidden_layers=1"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    record = json.loads(Path("race/race.json").read_text())
    assert list(record["recipes"]) == ["nanogpt", changed]
    first = Path("race/nanogpt-seed0/metrics.jsonl")
    before = first.stat().st_mtime_ns
    assert len({curve["loss"][-1] for curve in record["recipes"]["nanogpt"]}) == 2
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0
    assert first.stat().st_mtime_ns == before
    assert json.loads(Path("race/race.json").read_text()) == record
    refused = subprocess.run(
        [*command[:2], "auto,optimizer.eps=-1", *command[4:]], capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "failed: auto,optimizer.eps=-1 (seed 0)" in refused.stderr
    assert "optimizer.eps" in Path("race/auto,optimizer.eps=-1-seed0/train.log").read_text()
