"""Benchmark of tokenizing: pretrain and both encoders encode the same text, on as many cores."""

import os
import sys

import pytest

from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.engine.benchmark import tokenize as benchmark_tokenize
from pretrain_cli.engine.benchmark.tokenize import (
    Turn,
    gigatoken_turn,
    library_turn,
    measure,
    our_turn,
)

TEXTS = ["first document\n" * 40, "und der zweite, länger – ü\n" * 70, "3"]


@pytest.fixture
def request_of(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    return TokenizeRequest(
        paths=(str(tmp_path),), out=tmp_path / "out", tokenizer="bytes", workers=2
    )


def test_pretrain_and_both_encoders_encode_the_same_text(request_of, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    size = sum(len(text.encode()) for text in TEXTS)
    assert library_turn(request_of)[1:3] == (size, size)
    assert gigatoken_turn(request_of)[1:3] == (size, size)
    assert our_turn(request_of)[1:3] == (size, size + len(TEXTS))  # end-of-document tokens


def test_the_reported_seconds_are_the_median_of_the_turns(request_of, monkeypatch):
    seconds = {
        our_turn: iter([3.0, 1.0, 2.0]),
        library_turn: iter([9.0, 4.0, 5.0]),
        gigatoken_turn: iter([1.0, 0.5, 8.0]),
    }
    order = []

    def turn(kind, request):
        order.append(kind)
        return Turn(next(seconds[kind]), 100, 50)

    monkeypatch.setattr(benchmark_tokenize, "in_a_fresh_process", turn)
    measured = measure(request_of, 3, lambda _: None)
    assert (measured.seconds, measured.library_seconds, measured.ratio) == (2.0, 5.0, 2.5)
    assert (measured.gigatoken_seconds, measured.gigatoken_ratio) == (1.0, 0.5)
    assert order == [library_turn, gigatoken_turn, our_turn] * 3


def test_without_gigatoken_there_is_no_such_arm(request_of, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    assert gigatoken_turn(request_of) is None
    monkeypatch.setattr(
        benchmark_tokenize,
        "in_a_fresh_process",
        lambda kind, request: None if kind is gigatoken_turn else Turn(1.0, 100, 50),
    )
    measured = measure(request_of, 1, lambda _: None)
    assert (measured.gigatoken_seconds, measured.gigatoken_ratio) == (None, None)
