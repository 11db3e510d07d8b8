"""`pretrain benchmark tokenize`: compared with the library, or refused."""

import json
from pathlib import Path

import pytest


def test_tokenizing_is_compared_with_the_library(pretrain, corpus):
    size = sum(path.stat().st_size for path in corpus.rglob("*.txt"))
    line = "benchmark tokenize --tokenizer bytes --text corpus --rounds 1 --workers 1 --json t.json"
    outcome = pretrain(line)
    assert outcome.code == 0, outcome.err
    (result,) = json.loads(Path("t.json").read_text())["results"]
    assert result["bytes"] == size
    assert result["tokens"] == size + 30  # 30 end-of-document tokens
    assert result["seconds"] > 0
    assert result["ratio"] == pytest.approx(result["library_seconds"] / result["seconds"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--rounds 0", "--rounds: 0 is not at least 1"),
        ("--workers 0", "--workers: 0 is not at least 1"),
    ],
)
def test_invalid_tokenize_benchmark_options_are_refused(refused, options, said):
    assert refused(f"benchmark tokenize {options}").startswith(said)
