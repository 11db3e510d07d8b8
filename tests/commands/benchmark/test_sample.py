"""`pretrain benchmark sample`: sampling is measured, or refused."""

import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_sampling_is_measured(pretrain):
    line = "benchmark sample --seq-len 20 --max-tokens 6 --rounds 2 --batch-size 2"
    outcome = pretrain(f"{line} --json s.json")
    assert outcome.code == 0, outcome.err
    assert "gemma3-tiny 2 × 20 tokens, then 6 generated" in outcome.out
    written = json.loads(Path("s.json").read_text())
    (ours,) = written["results"]
    assert ours["ratio"] is None
    rates = sorted(rate for _, rate in ours["rounds"])
    assert ours["decode_tokens_per_second"] == pytest.approx(sum(rates) / 2)
    assert written["limit"] == pytest.approx(2 * written["copy_rate"] / written["step_bytes"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--max-tokens 1", "--max-tokens: 1 is not at least 2"),
        ("--rounds 0", "--rounds: 0 is not at least 1"),
        ("--batch-size 0", "--batch-size: 0 is not at least 1"),
        ("--seq-len 0", "--seq-len: 0 is not at least 1"),
        ("--seq-len 2048", "--seq-len: 2,048 and --max-tokens 256 are beyond the model's 2,048"),
        ("--vs vllm", "--vs: 'vllm' is not transformers"),
        ("--dtype int8", "speed.dtype: 'int8' is not one of"),
        ("--dtype float8", "speed.dtype: 'float8' can't be used: it is a way to train"),
    ],
)
def test_invalid_sample_benchmark_options_are_refused(refused, options, said):
    assert refused(f"benchmark sample {options}").startswith(said)
