"""Packing: whole documents in samples, every token a target once, an index built once."""

import hashlib
import json
import tempfile
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data import packing
from pretrain_cli.data.batches import Batch, Batches
from pretrain_cli.data.dataset import Split
from pretrain_cli.data.packing import Packed, best_fit, open_packed, pack
from pretrain_cli.data.parallel import map_in_order
from pretrain_cli.data.shards import IndexedStarts
from pretrain_cli.data.token_files import SeparatedStarts
from pretrain_cli.targets import IGNORE_INDEX

LENGTHS = st.lists(st.integers(1, 12) | st.integers(1, 60), min_size=1, max_size=80)


def rooms_of_a_plain_packing(sizes, capacity):
    """Return the room left in each bin by best-fit decreasing, placing one piece at a time."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda number: rooms[number])] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


def packed(stream, lengths, seq_len):
    """Return packed samples of documents with these lengths. Token values are positions."""
    pieces, samples, totals = pack(np.cumsum([0, *lengths]), seq_len)
    tokens = stream(range(sum(lengths)))
    return Packed(tokens, pieces, samples, seq_len=seq_len, fingerprint="made", totals=totals)


def rows_of(samples):
    """Read all samples. -> inputs and targets, (samples, seq_len)."""
    inputs = np.full((len(samples), samples.seq_len), 7777)
    batch = Batch(inputs, inputs.copy(), documents=None)
    numbers = np.arange(len(samples))
    samples.fill(numbers, numbers, batch)
    return batch.inputs, batch.targets


# --- placement of pieces -------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=150), capacity=st.integers(40, 60))
def test_best_fit_fills_bins_like_placing_one_piece_at_a_time(sizes, capacity):
    sizes = np.sort(sizes)[::-1]
    bins = best_fit(sizes, capacity)
    rooms = capacity - np.bincount(bins, weights=sizes)
    assert sorted(rooms) == rooms_of_a_plain_packing(sizes.tolist(), capacity)


@given(
    many=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3000)), min_size=1, max_size=6),
    capacity=st.integers(20, 90),
)
def test_best_fit_fills_bins_with_many_pieces_of_few_sizes(many, capacity):
    sizes = np.concatenate([np.full(count, size) for size, count in many])
    sizes = np.sort(sizes)[::-1]
    bins = best_fit(sizes, capacity)
    filled = np.bincount(bins, weights=sizes)
    assert filled.max() <= capacity
    # best fit would have merged two bins that are at most half full
    assert (filled <= capacity / 2).sum() <= 1


# --- contents of samples -------------------------------------------------------------------------


@given(lengths=LENGTHS, seq_len=st.integers(1, 30))
def test_every_token_is_a_target_once_after_its_predecessor(stream, lengths, seq_len):
    inputs, targets = rows_of(packed(stream, lengths, seq_len))
    counted = targets != IGNORE_INDEX
    borders = np.cumsum([0, *lengths])
    begins = np.isin(targets, borders[:-1])
    inside = counted & ~begins
    assert sorted(targets[inside]) == sorted(set(range(sum(lengths))) - set(borders.tolist()))
    assert np.array_equal(inputs[inside], targets[inside] - 1)
    # a document's first token is a target at most once, after the end of another document
    assert set(inputs[begins].tolist()) <= set((borders[1:] - 1).tolist())
    assert len(set(targets[begins].tolist())) == begins.sum()


@given(lengths=LENGTHS, seq_len=st.integers(1, 30))
def test_a_document_that_fits_in_a_sample_is_not_cut(stream, lengths, seq_len):
    _, targets = rows_of(packed(stream, lengths, seq_len))
    begin = 0
    for length in lengths:
        rest = set(range(begin + 1, begin + length))
        begin += length
        if 1 < length <= seq_len + 1:
            assert len([row for row in targets.tolist() if rest & set(row)]) == 1


@given(lengths=LENGTHS, seq_len=st.integers(1, 30))
def test_packing_makes_as_many_samples_as_plain_best_fit(stream, lengths, seq_len):
    """The reference places the same pieces by best-fit decreasing, one at a time."""
    sizes = []
    for length in lengths:
        while length > seq_len + 1:
            sizes.append(seq_len + 1)
            length -= seq_len
        sizes.append(length)
    samples = packed(stream, lengths, seq_len)
    assert len(samples) == len(rooms_of_a_plain_packing(sizes, seq_len + 1))
    assert samples.totals.filled == sum(sizes)
    long = [length for length in lengths if length > seq_len + 1]
    assert samples.totals.cut_documents == len(long)
    assert samples.totals.cut_tokens == sum(length - seq_len - 1 for length in long)


@given(lengths=LENGTHS, seq_len=st.integers(1, 30))
def test_target_counts_match_the_targets_that_are_not_ignored(stream, lengths, seq_len):
    samples = packed(stream, lengths, seq_len)
    _, targets = rows_of(samples)
    for number, row in enumerate(targets):
        assert samples.targets(np.array([number])) == (row != IGNORE_INDEX).sum()
    assert samples.targets(np.arange(len(samples))) == (targets != IGNORE_INDEX).sum()


@given(lengths=LENGTHS, seq_len=st.integers(1, 30))
def test_each_piece_has_its_own_document_number(stream, lengths, seq_len):
    """Documents are numbered by pieces, not by separators, because a piece that continues a
    document may have no separator before it."""
    samples = packed(stream, lengths, seq_len)
    whole = Batches([samples], [1], seq_len=seq_len, samples_per_step=len(samples), seed=0,
                    documents=True).starting_at(0)  # fmt: skip
    assert whole.documents is not None
    borders = np.cumsum([0, *lengths])
    for row, numbers in zip(whole.inputs, whole.documents, strict=True):
        held = np.flatnonzero(row)  # without padding and token 0
        from_borders = np.searchsorted(borders, row[held], side="right")
        numbered = list(zip(from_borders.tolist(), numbers[held].tolist(), strict=True))
        assert len(set(numbered)) == len(set(from_borders.tolist())) == len(set(numbers[held]))


def test_three_documents_are_packed_as_expected(stream):
    """Documents of tokens 0-6, 7-8 and 9-11 in samples of 5 tokens. The first is cut after token 4.
    Its rest starts with token 4 again, and the second document fits after it."""
    inputs, targets = rows_of(packed(stream, [7, 2, 3], 4))
    assert inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [9, 10, 11, 0]]
    assert targets.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [10, 11, IGNORE_INDEX, IGNORE_INDEX]]


def test_a_continued_piece_is_not_predicted_from_another_document(stream):
    """The second sample holds a document of 3 tokens and the last 2 of a document of 6. Token 7 is
    a target after token 6, in the first sample, and not after token 2."""
    inputs, targets = rows_of(packed(stream, [3, 6], 4))
    assert inputs.tolist() == [[3, 4, 5, 6], [0, 1, 2, 7]]
    assert targets.tolist() == [[4, 5, 6, 7], [1, 2, IGNORE_INDEX, 8]]


# --- the index on disk ---------------------------------------------------------------------------


class Documents:
    """Stand-in for a dataset's document starts."""

    def __init__(self, borders):
        self.starts = np.array(borders[:-1])

    def between(self, first, last):
        return self.starts[(self.starts >= first) & (self.starts < last)]


@pytest.fixture
def dataset(stream, tmp_path):
    """Dataset of 400 documents of 1 to 299 tokens, except one of 2000."""
    lengths = np.random.default_rng(0).integers(1, 300, 400)
    lengths[17] = 2000
    borders = np.cumsum([0, *lengths])
    split = SimpleNamespace(tokens=stream(range(borders[-1])), documents=Documents(borders))
    (tmp_path / "data").mkdir()
    return SimpleNamespace(path=tmp_path / "data", fingerprint="made", train=split)


def name(seq_len):
    return f"packing-best-fit-{seq_len}.idx"


def test_the_packing_index_is_built_once_and_is_reproducible(dataset):
    said = []
    first = rows_of(open_packed(dataset, 128, said.append))
    path = dataset.path / name(128)
    data, written = path.read_bytes(), path.stat().st_mtime_ns
    assert np.array_equal(rows_of(open_packed(dataset, 128, said.append)), first)
    assert path.stat().st_mtime_ns == written
    assert len(said) == 1
    assert said[0].endswith("packing documents into samples of 128 tokens, once")
    path.unlink()
    open_packed(dataset, 128, said.append)
    assert path.read_bytes() == data
    open_packed(dataset, 64, said.append)
    assert sorted(file.name for file in dataset.path.iterdir()) == [name(128), name(64)]


def test_a_dataset_larger_than_a_group_is_packed_group_by_group(dataset, monkeypatch):
    monkeypatch.setattr(packing, "GROUP_TOKENS", 1000)
    monkeypatch.setattr(packing, "GROUP_SAMPLES", 1)
    samples = open_packed(dataset, 128, lambda _: None)
    inputs, targets = rows_of(samples)
    starts = dataset.train.documents.starts.tolist()
    inside = (targets != IGNORE_INDEX) & ~np.isin(targets, starts)
    total = len(dataset.train.tokens)
    assert sorted(targets[inside]) == sorted(set(range(total)) - set(starts))
    assert np.array_equal(inputs[inside], targets[inside] - 1)
    assert samples.totals.tokens == total
    assert samples.totals.samples == len(samples)
    # a sample's documents lie within one group: 1000 tokens plus at most one document
    spread = inputs.max(1) - np.where(inputs, inputs, total).min(1)
    assert spread.max() < 1300


GOLDEN = {
    16: "b66aa94676c73b47f23ddfda37201534cb2b8456bf207ac704ea51484dc1076f",
    100: "a17f681c59d6369f5ae73dd4702b1cc4a39c955723203932fc184c763a3ace14",
}
"""SHA-256 of the index of `many_documents`, from when one process built it from start to end."""


@pytest.fixture
def many_documents(stream):
    """Tokens of 600 documents in shards of 9,000 tokens, and their starts. One document is longer
    than two groups. Token 0 ends a document."""
    lengths = (np.arange(600) * 7919 + 13) % 211 + 1
    lengths[300] = 5000
    borders = np.cumsum([0, *lengths])
    tokens = np.ones(borders[-1], np.uint16)
    tokens[borders[1:] - 1] = 0
    row = stream(*[tokens[at : at + 9000] for at in range(0, len(tokens), 9000)])
    return row, borders[:-1]


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("starts", ["in an index", "searched for"])
@pytest.mark.parametrize("seq_len", GOLDEN)
def test_any_number_of_processes_builds_the_same_index(
    many_documents, tmp_path, monkeypatch, workers, starts, seq_len
):
    monkeypatch.setattr(packing, "GROUP_TOKENS", 2000)
    monkeypatch.setattr(packing, "GROUP_SAMPLES", 1)
    monkeypatch.setattr(packing, "cores", lambda: workers)
    used = []

    def counted(work, items, workers):
        used.append(workers)
        return map_in_order(work, items, workers)

    monkeypatch.setattr(packing, "map_in_order", counted)
    row, places = many_documents
    if starts == "in an index":
        borders = row.borders
        parts = [
            places[(places >= first) & (places < last)] - first for first, last in pairwise(borders)
        ]
        documents = IndexedStarts([part.astype("<u8") for part in parts], borders[:-1])
    else:
        documents = SeparatedStarts(row, 0, leads=False)
    packing.build_index(tmp_path / "index", Split(row, documents, 0), "golden", seq_len)
    assert hashlib.sha256((tmp_path / "index").read_bytes()).hexdigest() == GOLDEN[seq_len]
    assert used == [workers]


def test_borders_of_groups_are_found_without_reading_all_starts(many_documents, monkeypatch):
    monkeypatch.setattr(packing, "FIRST_SEARCHED", 64)
    row, places = many_documents
    read = 0

    class Counted(Documents):
        def between(self, first, last):
            nonlocal read
            read += last - first
            return super().between(first, last)

    split = Split(row, Counted([*places, len(row)]), 0)
    groups = list(packing.groups_of_documents(split, 2000))
    assert groups[0][0] == 0
    assert groups[-1][1] == len(row)
    for (_, end), (first, _) in pairwise(groups):
        assert end == first
        assert first in places
    assert read < len(row) / 4


@pytest.mark.parametrize("change", ["cut", "altered", "no header", "of another dataset", "older"])
def test_a_damaged_or_foreign_packing_index_is_rebuilt(dataset, change):
    made = rows_of(open_packed(dataset, 128, lambda _: None))
    path = dataset.path / name(128)
    intact = path.read_bytes()
    data = bytearray(intact)
    if change == "cut":
        del data[-1:]
    elif change == "altered":
        data[-20] ^= 1
    elif change == "no header":
        data[:10] = bytes(10)
    else:
        header = json.loads(data[:4096])
        header |= {"dataset": "other"} if change == "of another dataset" else {"format_version": 0}
        data[:4096] = json.dumps(header).encode().ljust(4096)
    path.write_bytes(data)
    said = []
    assert np.array_equal(rows_of(open_packed(dataset, 128, said.append)), made)
    assert len(said) == 2
    assert said[0].startswith(f"{path}: ")
    assert said[0].endswith("it is built again")
    assert path.read_bytes() == intact


def test_a_read_only_dataset_keeps_its_packing_index_elsewhere(dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = rows_of(open_packed(dataset, 128, lambda _: None))
    (dataset.path / name(128)).unlink()
    (dataset.path / name(128)).mkdir()  # makes writing the file fail
    for times in (1, 2):
        said = []
        assert np.array_equal(rows_of(open_packed(dataset, 128, said.append)), expected)
        assert any("the index is kept in" in text for text in said) == (times == 1)
    assert not [path for path in dataset.path.iterdir() if path.suffix == ".partial"]
    assert list(tmp_path.glob("pretrain-*.idx"))


# --- in batches ----------------------------------------------------------------------------------


@given(world_size=st.sampled_from([1, 2, 4, 8]), first=st.integers(0, 10**9))
def test_samples_and_target_count_are_equal_for_any_world_size(stream, world_size, first):
    rng = np.random.default_rng(1)
    sources = [packed(stream, rng.integers(1, 40, 50).tolist(), 16) for _ in range(2)]
    sources[1].fingerprint = "another"
    options = {"seq_len": 16, "samples_per_step": 8, "seed": 0}
    alone = Batches(sources, [3, 2], **options).starting_at(first)
    assert alone.counted == (alone.targets != IGNORE_INDEX).sum()
    shares = [
        Batches(sources, [3, 2], rank=rank, world_size=world_size, **options).starting_at(first)
        for rank in range(world_size)
    ]
    assert {share.counted for share in shares} == {alone.counted}
    assert np.array_equal(alone.inputs, np.concatenate([share.inputs for share in shares]))
    assert np.array_equal(alone.targets, np.concatenate([share.targets for share in shares]))
