"""Document numbers of the tokens in a sample."""

import numpy as np

from pretrain_cli.data.batches import document_numbers

END = 9


def numbers(*rows, leads=False):
    return document_numbers(np.array(rows), END, leads=leads).tolist()


def test_a_trailing_separator_ends_a_document():
    assert numbers([1, 2, END, 3, END, 4, 5]) == [[0, 0, 0, 1, 1, 2, 2]]


def test_a_leading_separator_begins_a_document():
    assert numbers([1, 2, END, 3, END, 4, 5], leads=True) == [[0, 0, 1, 1, 2, 2, 2]]


def test_the_rest_of_a_cut_document_counts_as_a_document():
    assert numbers([3, 4, END, 5], [END, 3, 4, 5]) == [[0, 0, 0, 1], [0, 1, 1, 1]]
    cut, whole = numbers([3, 4, END, 5], [END, 3, 4, 5], leads=True)
    assert cut == [0, 0, 1, 1]
    assert len(set(whole)) == 1


def test_a_separator_alone_is_a_document():
    assert numbers([END, END, 1, END]) == [[0, 1, 2, 2]]


def test_rows_without_a_separator_are_one_document():
    assert numbers([1, 2, 3], [4, 5, 6]) == [[0, 0, 0], [0, 0, 0]]
