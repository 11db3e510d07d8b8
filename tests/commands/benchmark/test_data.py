"""`pretrain benchmark data`: reading batches is measured, or refused."""

import json
from pathlib import Path

import pytest

from pretrain_cli.engine.benchmark import data as benchmark_data


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(benchmark_data, "SECONDS", 0.05)
    monkeypatch.setattr(benchmark_data, "RANDOM_BATCHES", 20)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_reading_is_measured_on_temporary_random_tokens(pretrain, tmp_path, monkeypatch, packing):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    outcome = pretrain(
        f"benchmark data --size 0.001 --packing {packing} --seq-len 64 --json r.json"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("Random tokens, 1.0 MB in the page cache, one thread\n")
    assert "µs a batch of 8 × 64" in outcome.out
    written = json.loads(Path("r.json").read_text())
    assert written["workload"] == {"seq_len": 64, "samples": 8, "packing": packing}
    result = written["result"]
    assert (result["tokens"], result["size"]) == (500_000, 1_000_000)
    assert result["tokens_per_second"] > 100_000
    assert 0 < result["batch_seconds"] < 0.1
    if packing == "best-fit":
        assert result["index_seconds"] > 0
        assert 0.9 < result["filled"] <= 1
        assert "Best-fit packing of 500k tokens: " in outcome.out
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.usefixtures("quick", "trained")
def test_reading_is_measured_on_a_dataset(pretrain):
    before = sorted(Path("data/corpus").iterdir())
    outcome = pretrain("benchmark data --data data/corpus --packing best-fit --seq-len 32")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("data/corpus, 2")
    assert sorted(Path("data/corpus").iterdir()) == before


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--data data/corpus --size 3", "--size: 3 GB is of what is made; leave it out with"),
        ("--size 0", "--size: 0 is not above 0"),
        ("--size inf", "--size: inf is not above 0"),
        ("--size 1e9", "--size: 1e+09 GB is more than "),
        ("--tokenizer gpt2", "--tokenizer: 'gpt2' says what made the .bin files of --data"),
        ("--data nowhere", "nowhere: no such dataset"),
        ("--packing tight", "data.packing: 'tight' is not one of concat, best-fit"),
        ("--seq-len 0", "data.seq_len: 0 is not greater than 0"),
        ("--data data/corpus --seq-len 20000", "data.seq_len: 20,000 is beyond the 1"),
        ("--micro-batch-size 0", "train.micro_batch_size: 0 is not greater than 0"),
    ],
)
def test_invalid_data_benchmark_options_are_refused(refused, options, said):
    assert refused(f"benchmark data {options}").startswith(said)
