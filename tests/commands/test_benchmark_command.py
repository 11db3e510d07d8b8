"""`pretrain benchmark`: the real step, timed, and what can't be timed said."""

import json
from pathlib import Path

import pytest

from pretrain_cli.engine import benchmark_data

MODEL = (
    "--model gemma3-tiny --set model.layer_types=[sliding_attention,full_attention] "
    "--set model.hidden_size=32 --set model.intermediate_size=48 --set model.head_dim=16 "
    "--set model.query_pre_attn_scalar=16 --set model.sliding_window=8 --set model.vocab_size=512"
)


@pytest.mark.slow
def test_a_backend_that_cannot_train_here_is_timed_forward_only(pretrain):
    outcome = pretrain(
        f"benchmark --attn flex,sdpa {MODEL} --seq-len 32 --micro-batch-size 2 --steps 3 "
        "--warmup 1 --device cpu --json results.json"
    )
    assert outcome.code == 0, outcome.err
    flex = "flex: PyTorch's flex_attention has no backward pass on a CPU; its forward pass alone"
    assert flex in outcome.out
    for heading in ("median", "tokens/s", "MFU", "memory", "warm-up"):
        assert heading in outcome.out
    rows = {line.split()[1]: line for line in outcome.out.splitlines() if line.startswith("│")}
    assert "forward only" in rows["flex"]
    assert "training step" in rows["sdpa"]

    written = json.loads(Path("results.json").read_text())
    assert written["workload"]["seq_len"] == 32
    assert written["peak"]["flops"] > 0
    assert written["peak"]["source"].startswith("measured")
    flex, sdpa = written["results"]
    assert (flex["attention"], flex["kind"]) == ("flex", "forward only")
    assert "no backward pass" in flex["reason"]
    assert (sdpa["attention"], sdpa["kind"], sdpa["reason"]) == ("sdpa", "training step", "")
    for row in (flex, sdpa):
        assert 0 < row["step_fastest"] <= row["step_median"] <= row["step_slowest"]
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_median"])
        assert row["warmup"] > 0
        assert 0 < row["mfu"] <= row["mfu_conventional"]
        assert row["peak_memory"] > 10_000_000
        assert 4 < row["loss"] < 9  # of 512 random tokens: about ln 512 = 6.2
        assert row["speed"]["attention"]["in_force"] == row["attention"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "--attn fleks",
            "--attn: 'fleks' is not one of eager, sdpa, flex, blocks, all; did you mean flex",
        ),
        ("--attn sdpa,", "--attn: '' is not one of eager, sdpa, flex, blocks, all"),
        ("--model gema3", "model: 'gema3' is not a model or a YAML file; did you mean gemma3?"),
        ("--device cuda:99", "train.device: 'cuda:99' is not there"),
        ("--device gpu", "train.device: 'gpu' is not a device; give cpu, cuda, cuda:N or mps"),
        ("--dtype float8", "speed.dtype: 'float8' is not one of auto, float32, bfloat16"),
        ("--steps 0", "--steps: 0 is not at least 1"),
        ("--warmup -1", "--warmup: -1 is not at least 0"),
        ("--seq-len 5000", "--seq-len: 5,000 is beyond the model's 2,048 positions"),
        ("--seq-len 0", "data.seq_len: 0 is not greater than 0"),
        ("--micro-batch-size 0", "train.micro_batch_size: 0 is not greater than 0"),
        ("--set speed.atention=sdpa", "speed.atention: no such setting; did you mean speed.attent"),
        ("--set train.steps=3", "--set train.steps=3: not a setting of a benchmark; it takes sp"),
        ("--set model.name=qwen3", "--set model.name=qwen3: not a setting of a benchmark"),
        ("--json nowhere/results.json", "--json: no folder nowhere to write results.json in"),
        ("--json .", "--json: . is a folder; give a file"),
        ("--size 2", "--size: an option of pretrain benchmark data, not of step; leave it out"),
        ("dta", "benchmark: 'dta' is not one of step, data, tokenize; did you mean data?"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_it_is_tried(refused, options, said):
    model = "" if "--model" in options else "--model gemma3-tiny"
    assert refused(f"benchmark {model} {options}").startswith(said)


# --- reading batches -----------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(benchmark_data, "SECONDS", 0.05)
    monkeypatch.setattr(benchmark_data, "RANDOM_BATCHES", 20)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_reading_is_measured_on_tokens_that_are_made_and_taken_away(
    pretrain, tmp_path, monkeypatch, packing
):
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
        ("--steps 3", "--steps: an option of pretrain benchmark step, not of data; leave it out"),
        ("--set speed.dtype=float32", "--set: an option of pretrain benchmark step, not of data"),
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
def test_what_cannot_be_read_is_refused(refused, options, said):
    assert refused(f"benchmark data {options}").startswith(said)


# --- tokenizing ----------------------------------------------------------------------------------


def test_tokenizing_is_measured_beside_the_library(pretrain, corpus):
    size = sum(path.stat().st_size for path in corpus.rglob("*.txt"))
    line = "benchmark tokenize --tokenizer bytes --text corpus --rounds 1 --workers 1 --json t.json"
    outcome = pretrain(line)
    assert outcome.code == 0, outcome.err
    (result,) = json.loads(Path("t.json").read_text())["results"]
    assert result["bytes"] == size
    assert result["tokens"] == size + 30  # an end a document
    assert result["seconds"] > 0
    assert result["ratio"] == pytest.approx(result["library_seconds"] / result["seconds"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--seq-len 3", "--seq-len: an option of pretrain benchmark step and data, not of tokeniz"),
        ("--rounds 0", "--rounds: 0 is not at least 1"),
        ("--workers 0", "--workers: 0 is not at least 1"),
    ],
)
def test_what_cannot_be_tokenized_is_refused(refused, options, said):
    assert refused(f"benchmark tokenize {options}").startswith(said)
