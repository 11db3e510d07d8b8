"""Stages change the mixture and the length of samples at a step, and nothing is read twice."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.batches import Batches, Windows
from pretrain_cli.data.mixture import Source, Stage, mix
from pretrain_cli.data.stages import StagedBatches, plan_stages
from pretrain_cli.errors import ConfigError


def source(name, weight=None, tokens=10_000):
    tokenizer = SimpleNamespace(name="bytes", fingerprint="bytes")
    train = SimpleNamespace(tokens=range(tokens))
    dataset = SimpleNamespace(path=name, fingerprint=name, tokenizer=tokenizer, train=train)
    return Source(name, None if weight is None else Fraction(weight), dataset)


def planned(*stages, steps=100, max_epochs=None):
    """Plan stages of (first token, sources, length); a step has 64 tokens in samples of 16."""
    later = [Stage(tuple(sources), token, length) for token, sources, length in stages[1:]]
    return plan_stages(
        mix(stages[0][1], later), seq_len=16, tokens_per_step=64, steps=steps, max_epochs=max_epochs
    )


def facts(stages):
    return [(stage.first_step, stage.seq_len, [*map(float, stage.weights)]) for stage in stages]


def test_a_stage_begins_with_the_step_at_or_after_its_token():
    a, b = source("a", 3), source("b", 1)
    stages = planned((0, [a, b], None), (128, [a], 32), (129, [b], None))
    assert facts(stages) == [(0, 16, [3, 1]), (2, 32, [3, 0]), (3, 16, [0, 1])]
    assert str(stages[1]) == "a:3, samples of 32 tokens"


@pytest.mark.parametrize(
    ("token", "length", "said"),
    [
        (0, None, "the stage after 0 tokens begins in the same step as the one before, and a step"),
        (64, 24, "seq_len 24 is not a multiple of the first stage's 16; give for example 16"),
        (64, 48, "a step's 64 tokens are no whole number of samples of 48; give another seq_len"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(token, length, said):
    with pytest.raises(ConfigError) as error:
        planned((0, [source("a")], None), (token, [source("a")], length))
    assert str(error.value).startswith(f"data.stages: {said}")


def test_a_dataset_that_was_read_often_enough_leaves_the_mixture():
    """b gives 16 of a step's 64 tokens, and has 2 times 80 to give."""
    stages = planned((0, [source("a", 3), source("b", 1, 80)], None), max_epochs=2)
    assert facts(stages) == [(0, 16, [3, 1]), (10, 16, [3, 0])]


def test_the_tokens_of_earlier_stages_count_towards_the_most_epochs():
    """b gives 32 tokens a step, then 16, of its 512."""
    a, b = source("a", 1), source("b", 1, 512)
    stages = planned((0, [a, b], None), (640, [source("a", 3), b], None), max_epochs=1)
    assert facts(stages) == [(0, 16, [1, 1]), (10, 16, [3, 1]), (22, 16, [3, 0])]


def test_a_stage_beyond_the_end_of_the_run_does_not_count():
    """The dataset lasts for the 100 steps, not for the 1,000 until the next stage."""
    stages = planned(
        (0, [source("a", tokens=6400)], None), (64_000, [source("b")], None), max_epochs=1
    )
    assert [(stage.first_step, stage.weights) for stage in stages] == [(0, (None, 0))]


@pytest.mark.parametrize(
    ("stages", "step"),
    [
        ([(0, [source("a", tokens=960), source("b", tokens=960)], None)], 30),
        ([(0, [source("a", 1), source("b", 1, 960)], None), (640, [source("b", 1)], None)], 20),
    ],
)
def test_a_stage_that_needs_more_epochs_of_everything_is_refused(stages, step):
    with pytest.raises(ConfigError) as error:
        planned(*stages, max_epochs=1)
    assert str(error.value) == (
        f"data.max_epochs: after {step} of 100 steps, all datasets of the stage have been read 1 "
        "times; give fewer --tokens, more text, or a larger data.max_epochs"
    )


@given(
    sizes=st.lists(st.integers(64, 5000), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    by_size=st.booleans(),
    max_epochs=st.floats(0.5, 3),
    steps=st.integers(1, 60),
)
def test_no_dataset_is_planned_beyond_the_most_epochs(sizes, weights, by_size, max_epochs, steps):
    sources = [
        source(f"s{n}", None if by_size else weights[n], size) for n, size in enumerate(sizes)
    ]
    try:
        stages = planned((0, sources, None), steps=steps, max_epochs=max_epochs)
    except ConfigError:
        # what is left of each doesn't last for a step
        assert steps * 64 > sum(sizes) * max_epochs - 64 * len(sizes)
        return
    read = np.zeros(len(sizes))
    for stage, end in zip(stages, [*(s.first_step for s in stages[1:]), steps], strict=True):
        parts = [
            size if w is None else float(w) for w, size in zip(stage.weights, sizes, strict=True)
        ]
        read += 64 * (end - stage.first_step) * np.array(parts) / sum(parts)
    assert (read <= max_epochs * np.array(sizes) + 1e-6).all()


def batches_of(lengths, weights, *, seq_len, before=None, **ranks):
    sources = [
        Windows(np.arange(1000 * n, 1000 * n + tokens), seq_len=seq_len, fingerprint=f"{n}",
                separator=0)
        for n, tokens in enumerate(lengths)
    ]  # fmt: skip
    return Batches(
        sources, weights, seq_len=seq_len, samples_per_step=32 // seq_len, seed=1, before=before,
        **ranks,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def plain_streams(monkeypatch):
    """Let windows read from an array."""
    monkeypatch.setattr(
        Windows, "fill",
        lambda self, numbers, rows, batch: batch.inputs.__setitem__(
            rows, numbers[:, None] * self.seq_len + self.tokens[0] + np.arange(self.seq_len)
        ),
    )  # fmt: skip


def test_a_source_goes_on_where_the_stage_before_left_it():
    first = batches_of([81, 81], [1, 1], seq_len=4)
    then = batches_of([81, 81], [3, 1], seq_len=4, before=first.counts(3 * 8))
    staged = StagedBatches([(0, first), (3, then)])
    inputs = np.concatenate([staged.starting_at(8 * step).inputs[:, 0] for step in range(4)])
    assert len(set(inputs.tolist())) == len(inputs) == 32  # within an epoch, no window twice
    assert staged.counts(24) == [12, 12]
    assert staged.counts(32) == [18, 14]


def test_longer_samples_count_as_so_many_of_the_first_length():
    first = batches_of([81, 81], [1, 0], seq_len=4)
    longer = batches_of([81, 81], [1, 1], seq_len=8)
    staged = StagedBatches([(0, first), (2, longer)])
    assert staged.samples_per_step == 8
    assert staged.starting_at(8).inputs.shape == (8, 4)
    assert staged.starting_at(16).inputs.shape == (4, 8)
    assert staged.counts(16) == [16, 0]
    assert staged.counts(24) == [20, 4]
    assert staged.counts(20) == [18, 2]
    assert (staged.starting_at(24).inputs == longer.starting_at(4).inputs).all()
    chosen, tokens = staged.sample(25)
    assert (tokens == longer.starting_at(4).inputs[1]).all()
    assert chosen == int(tokens[0] >= 1000)


def test_ranks_share_the_steps_of_every_stage():
    def staged(**ranks):
        return StagedBatches(
            [(step, batches_of([81, 81], weights, seq_len=seq_len, **ranks))
             for step, weights, seq_len in ((0, [1, 0], 4), (2, [1, 1], 8))]
        )  # fmt: skip

    for step in range(4):
        alone = staged().starting_at(8 * step).inputs
        shares = [staged(rank=r, world_size=2).starting_at(8 * step).inputs for r in range(2)]
        assert (np.concatenate(shares) == alone).all()
