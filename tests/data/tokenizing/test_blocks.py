"""Blocks: long documents are cut, and running sums and splits match a plain count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.corpus.documents import Document
from pretrain_cli.data.tokenizing import blocks as module
from pretrain_cli.data.tokenizing.blocks import BLOCK, Sums, are_held_out, blocks_of
from pretrain_cli.data.tokenizing.chunking import Chunker


def test_only_long_documents_have_several_blocks(load, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 100)
    cutter = Chunker(load("bytes"))
    for size, count in ((90, 1), (1000, 10)):
        text = (b"nine char " * 100)[:size]
        blocks = list(blocks_of(Document(size, b"0123456789abcdef", [text]), cutter))
        assert len(blocks) == pytest.approx(count, abs=1)
        assert b"".join(block.text for block in blocks) == text
        assert [block.begins for block in blocks] == [True, *[False] * (len(blocks) - 1)]
        assert [block.document_bytes for block in blocks] == [*[0] * (len(blocks) - 1), size]
        assert {block.digest for block in blocks} == {b"0123456789abcdef"}


@given(
    st.lists(st.binary(min_size=16, max_size=16), max_size=20),
    st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.01, 0.5]),
)
def test_the_split_is_decided_by_the_first_eight_bytes_of_the_hash(digests, fraction):
    held_out = are_held_out(np.array(digests, "V16"), fraction)
    expected = [int.from_bytes(d[:8], "little") < fraction * 2**64 for d in digests]
    assert held_out.tolist() == expected


@given(st.lists(st.tuples(*[st.booleans()] * 4, st.integers(0, 9)), max_size=12), st.data())
def test_running_sums_match_a_count(rows, data):
    blocks = np.zeros(len(rows), BLOCK)
    for number, (begins, ends, exact, _, size) in enumerate(rows):
        blocks[number] = (size, size * ends, bytes(16), begins, ends, exact, False)
    kept = np.array([row[3] for row in rows], bool)
    sums = Sums(blocks, kept)
    last = data.draw(st.integers(0, len(rows)))
    before = rows[:last]
    assert sums.documents[last] == sum(begins and keep for begins, _, _, keep, _ in before)
    assert sums.tokens[last] == sum(size * keep for *_, keep, size in before)
    assert sums.bytes[last] == sum(size * keep * ends for _, ends, _, keep, size in before)
    assert sums.duplicates[last] == sum(ends and not keep for _, ends, _, keep, _ in before)
    assert sums.inexact[last] == sum(keep and not exact for _, _, exact, keep, _ in before)
    ending = [number + 1 for number, row in enumerate(before) if row[1]]
    assert sums.after_end[last] == max(ending, default=0)
