"""Which tokens a step trains on: a pure function, every window once an epoch, for any ranks."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.batches import IGNORED, Batches, Permutation, validation_batches
from pretrain_cli.errors import ConfigError

SIZES = st.one_of(st.integers(1, 70), st.integers(1, 5000))


# --- the permutation -----------------------------------------------------------------------------


@given(size=SIZES, key=st.text(max_size=8))
def test_a_permutation_reaches_every_place_once(size, key):
    places = Permutation(size, key)(np.arange(size))
    assert np.array_equal(np.sort(places), np.arange(size))


@given(size=st.integers(2**20, 2**50), data=st.data())
def test_a_large_permutation_stays_inside_and_never_meets_itself(size, data):
    start = data.draw(st.integers(0, size - 2000))
    places = Permutation(size, "key")(np.arange(start, start + 2000))
    assert places.min() >= 0
    assert places.max() < size
    assert len(set(places.tolist())) == 2000


@given(size=SIZES, data=st.data())
def test_a_permutation_is_a_function_of_each_number_alone(size, data):
    numbers = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    whole = Permutation(size, "key")(np.arange(size))
    assert Permutation(size, "key")(np.array(numbers)).tolist() == whole[numbers].tolist()


def test_a_permutation_is_as_irregular_as_a_random_one():
    """Of 10,000 numbers about one stays, and about 1 in 10,000 pairs of neighbours; each key
    gives another order."""
    orders = [Permutation(10_000, f"key {number}")(np.arange(10_000)) for number in range(8)]
    for order in orders:
        assert (order == np.arange(10_000)).sum() < 10
        assert (np.abs(np.diff(order)) == 1).sum() < 20
        assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    for a, b in pairwise(orders):
        assert (a == b).sum() < 10


# --- training ------------------------------------------------------------------------------------


def batches_of(tokens, **changes):
    options = {"seq_len": 4, "samples_per_step": 6, "seed": 0, "fingerprint": "made"} | changes
    return Batches(tokens, **options)


def windows_seen(batches, first, steps):
    """The windows of `steps` steps from sample `first`, by the first token; tokens count up."""
    per_step = batches.samples_per_step
    inputs = [batches.starting_at(first + step * per_step)[0] for step in range(steps)]
    return np.concatenate(inputs)[:, 0] // batches.seq_len


def test_targets_are_the_inputs_one_token_on(stream):
    tokens = np.random.default_rng(0).integers(0, 60_000, 200)
    inputs, targets = batches_of(stream(tokens)).starting_at(0)
    assert inputs.shape == targets.shape == (6, 4)
    assert inputs.dtype == targets.dtype == np.int64
    whole = tokens.tolist()
    windows = [whole[4 * w : 4 * w + 5] for w in range(49)]
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert [*row, wanted[-1]] in windows
        assert row[1:] == wanted[:-1]


def test_every_window_is_seen_once_an_epoch(stream):
    batches = batches_of(stream(range(121)))  # 30 windows, and steps of 6
    assert batches.windows == 30
    epochs = [windows_seen(batches, 30 * epoch, 5) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
    assert len({tuple(epoch) for epoch in epochs}) == 3  # each in its own order


def test_every_token_but_the_first_is_a_target_once_an_epoch(stream):
    batches = batches_of(stream(range(121)))
    targets = [batches.starting_at(6 * step)[1] for step in range(5)]
    assert sorted(np.concatenate(targets).ravel()) == list(range(1, 121))


def test_a_step_goes_over_the_border_of_epochs(stream):
    batches = batches_of(stream(range(81)), samples_per_step=7)  # 20 windows
    seen = windows_seen(batches, 0, 20)  # 140 samples: seven epochs
    for epoch in range(7):
        assert sorted(seen[20 * epoch : 20 * epoch + 20]) == list(range(20))


def test_a_step_may_be_longer_than_an_epoch(stream):
    batches = batches_of(stream(range(13)), samples_per_step=9)  # 3 windows
    assert sorted(windows_seen(batches, 0, 1)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@given(
    world=st.sampled_from([1, 2, 3, 4, 6, 12]),
    first=st.integers(0, 10**9),
    tokens=st.integers(6, 300),
)
def test_the_order_is_the_same_for_any_number_of_ranks(stream, world, first, tokens):
    row = stream(range(tokens))
    alone = batches_of(row, samples_per_step=12).starting_at(first)
    shares = [
        batches_of(row, samples_per_step=12, rank=rank, world=world).starting_at(first)
        for rank in range(world)
    ]
    assert {share[0].shape for share in shares} == {(12 // world, 4)}
    for whole, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert np.array_equal(whole, np.concatenate(parts))


def test_any_step_is_read_at_once_whatever_was_read_before(stream):
    row = stream(range(500))
    straight = batches_of(row)
    steps = [straight.starting_at(6 * step) for step in range(40)]
    for step in (39, 0, 17, 17):
        again = batches_of(row).starting_at(6 * step)
        assert np.array_equal(again[0], steps[step][0])
        assert np.array_equal(straight.starting_at(6 * step)[0], steps[step][0])


def test_samples_do_not_depend_on_the_size_of_a_step(stream):
    row = stream(range(500))
    by_six = [batches_of(row).starting_at(6 * step)[0] for step in range(4)]
    by_eight = [batches_of(row, samples_per_step=8).starting_at(8 * s)[0] for s in range(3)]
    assert np.array_equal(np.concatenate(by_six), np.concatenate(by_eight))


def test_seed_and_dataset_each_give_another_order(stream):
    row = stream(range(500))
    orders = [
        windows_seen(batches_of(row, seed=seed, fingerprint=fingerprint), 0, 20).tolist()
        for seed, fingerprint in ((0, "made"), (1, "made"), (0, "made anew"))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_longest_window_is_the_whole_split(stream):
    inputs, targets = batches_of(stream(range(10)), seq_len=9).starting_at(0)
    assert inputs[0].tolist() == list(range(9))
    assert targets[0].tolist() == list(range(1, 10))
    with pytest.raises(ConfigError) as error:
        batches_of(stream(range(10)), seq_len=10)
    assert str(error.value).startswith("data.seq_len: 10 is beyond the dataset")
    assert "has 10 tokens; give at most 9" in str(error.value)


# --- validation ----------------------------------------------------------------------------------


@given(
    tokens=st.integers(0, 90),
    seq_len=st.integers(1, 20),
    batch_size=st.integers(1, 5),
    world=st.integers(1, 4),
)
def test_every_token_but_the_first_is_a_target_exactly_once(
    stream, tokens, seq_len, batch_size, world
):
    row = stream(range(100, 100 + tokens)) if tokens else stream()
    shapes, counts, targets = set(), set(), []
    for rank in range(world):
        batches = list(
            validation_batches(row, seq_len=seq_len, batch_size=batch_size, rank=rank, world=world)
        )
        counts.add(len(batches))
        for inputs, wanted in batches:
            shapes |= {inputs.shape, wanted.shape}
            counted = wanted != IGNORED
            assert np.array_equal(inputs[counted], wanted[counted] - 1)  # tokens count up
            targets += wanted[counted].tolist()
    assert sorted(targets) == list(range(101, 100 + tokens))
    assert shapes <= {(batch_size, seq_len)}
    # ranks do the same number, or they would wait for each other forever; and no more than needed
    rows = math.ceil(max(tokens - 1, 0) / seq_len)
    assert counts == {math.ceil(rows / (batch_size * world))}


def test_validation_reads_on_across_windows(stream):
    """Each window begins with the token that the one before it ended on."""
    ((inputs, targets),) = validation_batches(stream(range(8)), seq_len=3, batch_size=3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, -100, -100]]
