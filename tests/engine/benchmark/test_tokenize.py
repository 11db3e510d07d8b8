"""Benchmark of tokenizing: pretrain and the library encode the same text, with as many cores."""

import os

import pytest

from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.engine.benchmark import tokenize as benchmark_tokenize
from pretrain_cli.engine.benchmark.tokenize import Turn, library_turn, measure, our_turn

TEXTS = ["first document\n" * 40, "und der zweite, länger – ü\n" * 70, "3"]


@pytest.fixture
def request_of(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    return TokenizeRequest(
        paths=(str(tmp_path),), out=tmp_path / "out", tokenizer="bytes", workers=2
    )


def test_pretrain_and_the_library_encode_the_same_text(request_of, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    size = sum(len(text.encode()) for text in TEXTS)
    assert library_turn(request_of)[1:] == (size, size)
    assert our_turn(request_of)[1:] == (size, size + len(TEXTS))  # end-of-document tokens


def test_the_reported_seconds_are_the_median_of_the_turns(request_of, monkeypatch):
    seconds = {our_turn: iter([3.0, 1.0, 2.0]), library_turn: iter([9.0, 4.0, 5.0])}
    order = []

    def turn(kind, request):
        order.append(kind)
        return Turn(next(seconds[kind]), 100, 50)

    monkeypatch.setattr(benchmark_tokenize, "in_a_fresh_process", turn)
    measured = measure(request_of, 3, lambda _: None)
    assert (measured.seconds, measured.library_seconds, measured.ratio) == (2.0, 5.0, 2.5)
    assert order == [library_turn, our_turn] * 3
