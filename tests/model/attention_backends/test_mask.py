"""Masks as drawn matrices."""

import pytest
import torch

from pretrain_cli.model.attention_backends.mask import Documents, Mask
from tests.model.attention_backends.cases import CPU


def drawn(matrix):
    return ["".join("█" if seen else "·" for seen in row) for row in matrix.tolist()]


def test_a_causal_mask_is_a_lower_triangle():
    assert drawn(Mask(4, 4, None).matrix(CPU)[0]) == [
        "█···",
        "██··",
        "███·",
        "████",
    ]


def test_a_window_counts_the_query_itself():
    assert drawn(Mask(5, 5, 3).matrix(CPU)[0]) == [
        "█····",
        "██···",
        "███··",
        "·███·",
        "··███",
    ]


def test_a_window_of_one_is_the_diagonal():
    assert drawn(Mask(3, 3, 1).matrix(CPU)[0]) == [
        "█··",
        "·█·",
        "··█",
    ]


def test_queries_are_at_the_last_positions_of_the_keys():
    assert drawn(Mask(2, 5, None).matrix(CPU)[0]) == [
        "████·",
        "█████",
    ]
    assert drawn(Mask(3, 5, 3).matrix(CPU)[0]) == [
        "███··",
        "·███·",
        "··███",
    ]


def test_each_document_is_a_triangle():
    documents = torch.tensor([[0, 0, 1, 1, 1], [3, 4, 4, 4, 5]])
    first, second = Mask(5, 5, None, Documents(documents)).matrix(CPU)
    assert drawn(first) == [
        "█····",
        "██···",
        "··█··",
        "··██·",
        "··███",
    ]
    assert drawn(second) == [
        "█····",
        "·█···",
        "·██··",
        "·███·",
        "····█",
    ]


def test_a_window_slides_inside_each_document():
    (matrix,) = Mask(6, 6, 2, Documents(torch.tensor([[0, 0, 0, 1, 1, 1]]))).matrix(CPU)
    assert drawn(matrix) == [
        "█·····",
        "██····",
        "·██···",
        "···█··",
        "···██·",
        "····██",
    ]


@pytest.mark.parametrize(
    ("window", "plain"), [(None, True), (6, True), (5, True), (4, False), (1, False)]
)
def test_a_window_no_shorter_than_the_keys_is_plain_causal(window, plain):
    assert Mask(5, 5, window).is_plain_causal is plain
    assert not Mask(5, 5, window, Documents(torch.zeros(1, 5))).is_plain_causal
