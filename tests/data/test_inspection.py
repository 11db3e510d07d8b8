"""Inspection: document lengths equal a plain count, and samples are shown as documents."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data import inspection
from pretrain_cli.data.dataset import Split
from pretrain_cli.data.shards import IndexedStarts, TokenStream
from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Function that returns a split of one shard with documents of these lengths."""
    path = tmp_path_factory.mktemp("split") / "train-00000.bin"

    def make(lengths):
        np.zeros(sum(lengths), "<u2").tofile(path)
        starts = np.cumsum([0, *lengths[:-1]]).astype("<u8")
        return Split(TokenStream([path], "uint16"), IndexedStarts([starts], [0]), bytes=0)

    return make


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    at_once=st.sampled_from([1, 7, 64, 10_000]),
)
def test_document_lengths_do_not_depend_on_the_read_size(split, lengths, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "READ_AT_ONCE", at_once)
        found = inspection.document_lengths(split(lengths))
    assert (found.shortest, found.longest) == (min(lengths), max(lengths))
    by_power = Counter(1 << (length.bit_length() - 1) for length in lengths)
    assert found.by_power == dict(sorted(by_power.items()))


@pytest.mark.parametrize(
    ("starts", "documents"),
    [
        ([0, 3], [(True, "ab<|endoftext|>"), (True, "cd")]),
        ([3], [(False, "ab<|endoftext|>"), (True, "cd")]),
        ([], [(False, "ab<|endoftext|>cd")]),
    ],
)
def test_a_sample_is_shown_as_documents_with_named_marks(starts, documents):
    tokens = np.array([*b"ab", 256, *b"cd"])
    shown = inspection.documents_in(tokens, np.array(starts, int), load_tokenizer("bytes"))
    assert shown == documents
