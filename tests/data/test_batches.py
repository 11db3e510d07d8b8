"""Batches are a pure function: every window once per epoch, for any number of ranks."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.batches import Batches, Windows, validation_batches
from pretrain_cli.targets import IGNORE_INDEX

# --- training ------------------------------------------------------------------------------------


def batches_of(*rows, weights=None, seq_len=4, fingerprint="made", **changes):
    """Return batches of windows; each row of tokens is a source."""
    sources = [
        Windows(row, seq_len=seq_len, fingerprint=f"{fingerprint} {number}", separator=0)
        for number, row in enumerate(rows)
    ]
    weights = weights or [len(samples) for samples in sources]
    options = {"samples_per_step": 6, "seed": 0} | changes
    return Batches(sources, weights, seq_len=seq_len, **options)


def windows_seen(batches, first, steps):
    """Return the numbers of the windows in `steps` steps from sample `first`. Token values are
    consecutive, so the first token identifies the window."""
    per_step = batches.samples_per_step
    inputs = [batches.starting_at(first + step * per_step).inputs for step in range(steps)]
    return np.concatenate(inputs)[:, 0] // batches.seq_len


def test_targets_are_inputs_shifted_by_one_token(stream):
    tokens = np.random.default_rng(0).integers(0, 60_000, 200)
    batch = batches_of(stream(tokens)).starting_at(0)
    inputs, targets = batch.inputs, batch.targets
    assert batch.counted == 24
    assert inputs.shape == targets.shape == (6, 4)
    assert inputs.dtype == targets.dtype == np.int64
    whole = tokens.tolist()
    windows = [whole[4 * w : 4 * w + 5] for w in range(49)]
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert [*row, wanted[-1]] in windows
        assert row[1:] == wanted[:-1]


def test_every_window_is_read_once_per_epoch(stream):
    batches = batches_of(stream(range(121)))  # 30 windows, and steps of 6
    assert len(batches.sources[0]) == 30
    epochs = [windows_seen(batches, 30 * epoch, 5) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
    assert len({tuple(epoch) for epoch in epochs}) == 3  # three different orders


def test_every_token_but_the_first_is_a_target_once_per_epoch(stream):
    batches = batches_of(stream(range(121)))
    targets = [batches.starting_at(6 * step).targets for step in range(5)]
    assert sorted(np.concatenate(targets).ravel()) == list(range(1, 121))


def test_a_step_may_cross_an_epoch_boundary(stream):
    batches = batches_of(stream(range(81)), samples_per_step=7)  # 20 windows
    seen = windows_seen(batches, 0, 20)  # 140 samples: seven epochs
    for epoch in range(7):
        assert sorted(seen[20 * epoch : 20 * epoch + 20]) == list(range(20))


def test_a_step_may_be_longer_than_an_epoch(stream):
    batches = batches_of(stream(range(13)), samples_per_step=9)  # 3 windows
    assert sorted(windows_seen(batches, 0, 1)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@given(
    world_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    first=st.integers(0, 10**9),
    tokens=st.integers(6, 300),
)
def test_the_order_is_the_same_for_any_number_of_ranks(stream, world_size, first, tokens):
    rows = stream(range(tokens)), stream(range(1000, 1090))
    alone = batches_of(*rows, samples_per_step=12).starting_at(first)
    shares = [
        batches_of(*rows, samples_per_step=12, rank=rank, world_size=world_size).starting_at(first)
        for rank in range(world_size)
    ]
    assert {share.inputs.shape for share in shares} == {(12 // world_size, 4)}
    assert {share.counted for share in shares} == {alone.counted}  # each counts the whole step
    assert np.array_equal(alone.inputs, np.concatenate([share.inputs for share in shares]))
    assert np.array_equal(alone.targets, np.concatenate([share.targets for share in shares]))


def test_a_step_does_not_depend_on_earlier_reads(stream):
    row = stream(range(500))
    straight = batches_of(row)
    steps = [straight.starting_at(6 * step) for step in range(40)]
    for step in (39, 0, 17, 17):
        again = batches_of(row).starting_at(6 * step)
        assert np.array_equal(again.inputs, steps[step].inputs)
        assert np.array_equal(straight.starting_at(6 * step).inputs, steps[step].inputs)


def test_samples_do_not_depend_on_the_size_of_a_step(stream):
    row = stream(range(500))
    by_six = [batches_of(row).starting_at(6 * step).inputs for step in range(4)]
    by_eight = [batches_of(row, samples_per_step=8).starting_at(8 * s).inputs for s in range(3)]
    assert np.array_equal(np.concatenate(by_six), np.concatenate(by_eight))


def test_another_seed_or_dataset_changes_the_order(stream):
    row = stream(range(500))
    orders = [
        windows_seen(batches_of(row, seed=seed, fingerprint=fingerprint), 0, 20).tolist()
        for seed, fingerprint in ((0, "made"), (1, "made"), (0, "made anew"))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_window_may_be_the_whole_split(stream):
    batch = batches_of(stream(range(10)), seq_len=9).starting_at(0)
    assert batch.inputs[0].tolist() == list(range(9))
    assert batch.targets[0].tolist() == list(range(1, 10))


# --- several sources -----------------------------------------------------------------------------


def test_an_unweighted_mixture_reads_every_sample_once_per_epoch(stream):
    batches = batches_of(stream(range(81)), stream(range(1000, 1041)))  # 20 windows and 10
    for epoch in range(3):
        seen = windows_seen(batches, 30 * epoch, 5)
        assert sorted(seen) == [*range(20), *range(250, 260)]


def test_each_source_of_a_weighted_mixture_has_its_own_epochs(stream):
    batches = batches_of(stream(range(81)), stream(range(1000, 1041)), weights=[1, 3])
    seen = windows_seen(batches, 0, 20)  # 120 samples: 30 and 90 of them
    first, second = seen[seen < 250], seen[seen >= 250]
    assert sorted(first[:20]) == list(range(20))
    assert len(first) == 30
    for epoch in range(9):
        assert sorted(second[10 * epoch : 10 * epoch + 10]) == list(range(250, 260))


def test_a_source_has_the_same_order_in_any_mixture(stream):
    row, other = stream(range(81)), stream(range(1000, 1041))
    alone = windows_seen(batches_of(row), 0, 5)
    mixed = windows_seen(batches_of(row, other, weights=[1, 1]), 0, 10)
    assert mixed[mixed < 250].tolist() == alone.tolist()


def test_documents_are_numbered_by_the_separator_of_their_source(stream):
    """In one dataset, 9 ends a document; in the other, 7 begins one."""
    rows = stream([1, 9, 2, 3, 9, 4, 5]), stream([10, 7, 12, 13, 7, 7, 15])
    sources = [
        Windows(rows[0], seq_len=6, fingerprint="ends", separator=9),
        Windows(rows[1], seq_len=6, fingerprint="leads", separator=7, separator_leads=True),
    ]
    options = {"seq_len": 6, "samples_per_step": 2, "seed": 0}
    batch = Batches(sources, [1, 1], documents=True, **options).starting_at(0)
    assert batch.documents is not None
    rows = sorted(zip(batch.inputs.tolist(), batch.documents.tolist(), strict=True))
    assert rows == [
        ([1, 9, 2, 3, 9, 4], [0, 0, 1, 1, 1, 2]),
        ([10, 7, 12, 13, 7, 7], [0, 1, 1, 1, 2, 3]),
    ]
    assert Batches(sources, [1, 1], **options).starting_at(0).documents is None


# --- validation ----------------------------------------------------------------------------------


@given(
    tokens=st.integers(0, 90),
    seq_len=st.integers(1, 20),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
)
def test_every_validation_token_but_the_first_is_a_target_once(
    stream, tokens, seq_len, batch_size, world_size
):
    row = stream(range(100, 100 + tokens)) if tokens else stream()
    shapes, counts, targets = set(), set(), []
    for rank in range(world_size):
        batches = list(
            validation_batches(
                row, seq_len=seq_len, batch_size=batch_size, rank=rank, world_size=world_size
            )
        )
        counts.add(len(batches))
        for inputs, wanted in batches:
            shapes |= {inputs.shape, wanted.shape}
            counted = wanted != IGNORE_INDEX
            assert np.array_equal(inputs[counted], wanted[counted] - 1)  # values are consecutive
            targets += wanted[counted].tolist()
    assert sorted(targets) == list(range(101, 100 + tokens))
    assert shapes <= {(batch_size, seq_len)}
    # ranks with different numbers of batches would wait forever; and none has more than needed
    rows = math.ceil(max(tokens - 1, 0) / seq_len)
    assert counts == {math.ceil(rows / (batch_size * world_size))}


def test_validation_windows_overlap_by_one_token(stream):
    """Each window begins with the last token of the window before it."""
    ((inputs, targets),) = validation_batches(stream(range(8)), seq_len=3, batch_size=3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, -100, -100]]
