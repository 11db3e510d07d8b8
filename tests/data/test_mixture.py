"""Mixtures: parsing of paths and weights, and combinations that are refused."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.mixture import Source, Stage, as_integers, mix, parse_sources
from pretrain_cli.errors import ConfigError, DataError


def mixture(*asked, tokenizers=None):
    """Return a mixture of stand-in datasets; a dataset's fingerprint is its path in lower case."""
    sources = []
    for number, (text, (path, weight)) in enumerate(zip(asked, parse_sources(asked), strict=True)):
        made_with = tokenizers[number] if tokenizers else "bytes"
        tokenizer = SimpleNamespace(name=made_with, fingerprint=f"{made_with} 12345")
        dataset = SimpleNamespace(path=path, fingerprint=path.lower(), tokenizer=tokenizer)
        sources.append(Source(text, weight, dataset))
    return mix(sources)


def integers(mixed, samples, stage=0):
    return as_integers(mixed.weights(mixed.stages[stage]), samples)


def with_stages(first, *later):
    """Return a mixture with later stages, each (first token, sources)."""
    stages = [Stage(mixture(*asked).stages[0].sources, token) for token, asked in later]
    return mix(mixture(*first).stages[0].sources, stages)


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("data/a", "data/a", None),
        ("data/a:0.7", "data/a", Fraction(7, 10)),
        ("data/a:2", "data/a", 2),
        ("data/a:.5", "data/a", Fraction(1, 2)),
        ("data/a:1e-3", "data/a", Fraction(1, 1000)),
        ("C:/data/a:3.", "C:/data/a", 3),
        ("data/a:b", "data/a:b", None),
        ("data/a:2:0.25", "data/a:2", Fraction(1, 4)),
        ("data/v1.5", "data/v1.5", None),
        ("a:nan", "a:nan", None),
        (":1", ":1", None),
    ],
)
def test_only_a_number_after_the_last_colon_is_a_weight(text, path, weight):
    assert parse_sources([text]) == [(path, weight)]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["a:0.7", "b"], "data.path: b has no weight, and others have; give one to each, for "),
        (["a:0.7", "b:-0.1"], "data.path: the weight in b:-0.1 is below 0"),
        (["a:0", "b:0.0"], "data.path: the weights in a:0 b:0.0 sum to 0; give at least one"),
        (["a:0"], "data.path: the weights in a:0 sum to 0"),
    ],
)
def test_missing_negative_and_all_zero_weights_are_refused(asked, said):
    with pytest.raises(ConfigError) as error:
        parse_sources(asked)
    assert str(error.value).startswith(said)


def test_weights_become_integers_in_the_given_proportion():
    assert integers(mixture("a:0.7", "b:0.3"), [500, 100]) == [7, 3]
    assert integers(mixture("a:0.125", "b:2", "c:1"), [1, 1, 1]) == [1, 16, 8]
    assert integers(mixture("a:5"), [40]) == [5]
    assert integers(mixture("a", "b"), [500, 100]) == [500, 100]


def test_a_dataset_of_weight_0_is_used_only_for_validation():
    mixed = mixture("a:2", "b:0", "c:1")
    assert [source.name for source in mixed.trained_on] == ["a", "c"]
    assert integers(mixed, [7, 7]) == [2, 1]


def test_the_error_for_different_tokenizers_names_both():
    with pytest.raises(DataError) as error:
        mixture("data/a", "data/b", tokenizers=["gpt2", "bpe"])
    assert str(error.value) == (
        "data/b: made with the tokenizer bpe (bpe 1234), and data/a with gpt2 (gpt2 123); tokenize "
        "its text again, with --tokenizer data/a"
    )


def test_two_datasets_with_the_same_tokens_are_refused():
    with pytest.raises(DataError, match="DATA/A: the same tokens as data/a; give the dataset once"):
        mixture("data/a:1", "data/b:1", "DATA/A:2")


def test_a_mixture_of_one_dataset_has_its_fingerprint():
    assert mixture("a").fingerprint == mixture("a:0.3").fingerprint == "a"


@given(one=st.integers(1, 99), other=st.integers(1, 99), scale=st.integers(1, 9))
def test_a_mixtures_fingerprint_covers_its_datasets_and_weights(one, other, scale):
    fingerprint = mixture(f"a:{one}", f"b:{other}").fingerprint
    assert mixture(f"a:{one * scale}", f"b:{other * scale}").fingerprint == fingerprint
    for another in (
        mixture(f"a:{one}", f"b:{other + 1}"),
        mixture(f"a:{one}", f"c:{other}"),
        mixture("a", "b"),
        mixture(f"b:{one}", f"a:{other}"),
    ):
        assert another.fingerprint != fingerprint


def test_a_stage_has_the_weights_of_its_own_sources():
    mixed = with_stages(["a:3", "b:1"], (100, ["b", "c"]), (200, ["c:2", "a:0"]))
    assert [source.name for source in mixed.trained_on] == ["a", "b", "c"]
    assert integers(mixed, [7, 8, 9]) == [3, 1, 0]
    assert integers(mixed, [7, 8, 9], stage=1) == [0, 8, 9]
    assert integers(mixed, [7, 8, 9], stage=2) == [0, 0, 2]
    assert mixed.name == "a:3 b:1, then b c, then c:2 a:0"


def test_a_mixtures_fingerprint_covers_its_stages():
    made = [
        with_stages(["a"]),
        with_stages(["a"], (100, ["b"])),
        with_stages(["a"], (101, ["b"])),
        with_stages(["a"], (100, ["c"])),
        with_stages(["a"], (100, ["a:1", "b:2"])),
        with_stages(["a"], (100, ["b"]), (200, ["a"])),
    ]
    assert len({mixed.fingerprint for mixed in made}) == len(made)


def test_tokenizers_and_twins_are_refused_within_later_stages():
    other = mixture("b", tokenizers=["bpe"]).stages[0].sources
    with pytest.raises(DataError, match="b: made with the tokenizer bpe"):
        mix(mixture("a").stages[0].sources, [Stage(other, 100)])
    with pytest.raises(DataError, match="A: the same tokens as a"):
        with_stages(["b"], (100, ["a", "A"]))
