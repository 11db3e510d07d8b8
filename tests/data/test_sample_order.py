"""Sample order: each sample once per epoch and sources by weight, computed from k alone."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.sample_order import Interleaving, Order, Permutation

SIZES = st.one_of(st.integers(1, 70), st.integers(1, 5000))


# --- the permutation -----------------------------------------------------------------------------


@given(size=SIZES, key=st.text(max_size=8))
def test_a_permutation_reaches_every_number_once(size, key):
    places = Permutation(size, key)(np.arange(size))
    assert np.array_equal(np.sort(places), np.arange(size))


@given(size=st.integers(2**20, 2**50), data=st.data())
def test_a_large_permutation_stays_in_range_without_repeats(size, data):
    start = data.draw(st.integers(0, size - 2000))
    places = Permutation(size, "key")(np.arange(start, start + 2000))
    assert places.min() >= 0
    assert places.max() < size
    assert len(set(places.tolist())) == 2000


@given(size=SIZES, data=st.data())
def test_a_permuted_number_does_not_depend_on_other_numbers(size, data):
    numbers = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    whole = Permutation(size, "key")(np.arange(size))
    assert Permutation(size, "key")(np.array(numbers)).tolist() == whole[numbers].tolist()


def test_a_permutation_is_as_irregular_as_a_random_one():
    """A random permutation of 10,000 numbers leaves about one number in place and about two pairs
    of neighbours adjacent. Each key gives another order."""
    orders = [Permutation(10_000, f"key {number}")(np.arange(10_000)) for number in range(8)]
    for order in orders:
        assert (order == np.arange(10_000)).sum() < 10
        assert (np.abs(np.diff(order)) == 1).sum() < 20
        assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    for a, b in pairwise(orders):
        assert (a == b).sum() < 10


def test_permuted_places_and_distances_are_uniform():
    """χ² tests over 200 orders: of the new place against the old place, both in sixteenths, and of
    the distance between neighbours. χ² has its degrees of freedom as mean, and twice that as
    variance."""
    size, blocks = 9973, 16
    places, steps = [], []
    for number in range(200):
        order = Permutation(size, f"key {number}")(np.arange(size))
        cells = (order * blocks // size) * blocks + np.arange(size) * blocks // size
        expected = size / blocks**2
        places.append(((np.bincount(cells, minlength=256) - expected) ** 2 / expected).sum())
        far = np.diff(order) % size * blocks // size
        expected = (size - 1) / blocks
        steps.append(((np.bincount(far, minlength=16) - expected) ** 2 / expected).sum())
    # the sums of rows and columns of the first table are fixed: 15 × 15 degrees of freedom. The
    # mean of 200 values has a standard deviation of √(2 · degrees / 200)
    assert abs(np.mean(places) - 225) < 4 * (2 * 225 / 200) ** 0.5
    assert abs(np.mean(steps) - 15) < 4 * (2 * 15 / 200) ** 0.5


@pytest.mark.parametrize("size", [3, 5, 10])
def test_small_permutations_are_uniform(size):
    """Over many keys, each number comes to each place about equally often."""
    orders = np.array([Permutation(size, f"{key}")(np.arange(size)) for key in range(2000)])
    for place in range(size):
        share = np.bincount(orders[:, place], minlength=size) / 2000
        assert np.abs(share - 1 / size).max() < 4 * (1 / size / 2000) ** 0.5


# --- epochs --------------------------------------------------------------------------------------


@given(size=st.integers(1, 40), first=st.integers(0, 10**12), count=st.integers(0, 120))
def test_any_range_of_an_order_has_no_repeats_within_an_epoch(size, first, count):
    order = Order(size, "key")
    samples = order(np.arange(first, first + count))
    for epoch in range(first // size, (first + count) // size + 1):
        inside = samples[max(epoch * size - first, 0) : max((epoch + 1) * size - first, 0)]
        assert len(set(inside.tolist())) == len(inside)
        if len(inside) == size:
            assert sorted(inside) == list(range(size))
    for place in range(0, count, 7):
        assert order(np.array([first + place])) == samples[place]


def test_every_epoch_and_every_key_has_its_own_order():
    orders = [Order(100, key)(np.arange(300)).reshape(3, 100) for key in ("one", "other")]
    for one, other in pairwise([*orders[0], *orders[1]]):
        assert (one == other).sum() < 10


# --- the mixture of sources ----------------------------------------------------------------------

WEIGHTS = st.lists(st.integers(0, 60) | st.integers(0, 10**7), min_size=1, max_size=12).filter(any)


@given(weights=WEIGHTS, start=st.integers(0, 10**13))
def test_every_source_has_its_share_after_any_number_of_samples(weights, start):
    """The share is exact within 1 sample for up to three sources, within 1.7 for more."""
    interleaving = Interleaving(weights)
    numbers = start + np.arange(400)
    sources, _ = interleaving(numbers)
    before = np.array(interleaving.counts(start))
    each = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    due = np.array([[n * w for w in weights] for n in (numbers + 1).tolist()], dtype=object)
    shares = (before + each).astype(object) * sum(weights)  # beyond 63 bits
    off = np.abs(shares - due).max() / sum(weights)
    assert off <= (1 if sum(map(bool, weights)) <= 3 else 1.7)


@given(weights=WEIGHTS, start=st.integers(0, 10**13))
def test_samples_of_each_source_are_numbered_without_gaps(weights, start):
    interleaving = Interleaving(weights)
    sources, within = interleaving(np.arange(start, start + 300))
    before, after = interleaving.counts(start), interleaving.counts(start + 300)
    for source, (first, last) in enumerate(zip(before, after, strict=True)):
        assert within[sources == source].tolist() == list(range(first, last))
    assert sum(before) == start


@given(weights=WEIGHTS, numbers=st.lists(st.integers(0, 10**13), max_size=20))
def test_a_samples_source_does_not_depend_on_other_samples(weights, numbers):
    interleaving = Interleaving(weights)
    for number, *found in zip(numbers, *interleaving(np.array(numbers, np.int64)), strict=True):
        (source,), (within,) = interleaving(np.array([number]))
        assert found == [source, within]


@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=6), times=st.integers(0, 10**6))
def test_shares_are_exact_after_a_multiple_of_the_total_weight(weights, times):
    counts = Interleaving(weights).counts(times * sum(weights))
    assert counts == [times * weight for weight in weights]


def test_sources_of_weights_7_and_3_are_spread_evenly():
    sources, _ = Interleaving([7, 3])(np.arange(20))
    assert sources.tolist().count(1) == 6
    assert np.diff(np.flatnonzero(sources)).tolist() == [3, 4, 3, 3, 4]


def test_very_large_weights_keep_their_proportion():
    counts = Interleaving([7 * 10**30, 3 * 10**30, 0]).counts(10**12)
    assert counts == [pytest.approx(7e11, abs=1e4), pytest.approx(3e11, abs=1e4), 0]
