"""Encoders: gigatoken gives the ids of the tokenizers library, or is not used."""

import importlib
import itertools
import json
import pickle
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer
from pretrain_cli.data.tokenizing import encoder as module
from pretrain_cli.data.tokenizing import pipeline
from pretrain_cli.data.tokenizing.encoder import (
    DISPUTED,
    EncodersDiffer,
    GigatokenEncoder,
    LibraryEncoder,
    choose_encoder,
    texts_with_disputed,
)
from pretrain_cli.errors import ConfigError, DataError

pytest.importorskip("gigatoken")
KINDS = ["bytes", "bpe", "gpt2", "qwen3", "gemma3", "llama2"]
TEXTS = [
    *(
        "",
        "a",
        "One.\n",
        " two  spaces",
        "\n\n",
        "x" * 5000,
        "你好，世界。" * 2000,
        "<|endoftext|>",
    ),
    *("<s></s><bos>", "e\u0301\u0323", "\u07fd\u08d5", "\U00010941's", "\ufeffBOM", "a\r\nb\t"),
]


PAIRS = {}
"""Both encoders of each tokenizer, which take seconds to load."""


def pair_of(load, kind):
    tokenizer = load(kind)
    if kind not in PAIRS:
        PAIRS[kind] = LibraryEncoder(tokenizer), GigatokenEncoder(tokenizer)
    return PAIRS[kind]


@pytest.fixture(params=KINDS)
def both(load, request):
    return pair_of(load, request.param)


def assert_same(both, texts, continues=None):
    texts = [text.encode() for text in texts]
    expected, found = (e.encode(texts, continues or [False] * len(texts)) for e in both)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tolist() == theirs.tolist()


def test_both_encoders_give_the_same_ids(both):
    assert_same(both, TEXTS)


def test_texts_that_continue_a_document_are_encoded_alike(both):
    assert_same(both, TEXTS, [number % 2 > 0 for number in range(len(TEXTS))])


@pytest.mark.parametrize("kind", ["bytes", "llama2"])
def test_an_encoder_sent_to_another_process_gives_the_same_ids(load, kind):
    library, gigatoken = pair_of(load, kind)
    assert_same((library, pickle.loads(pickle.dumps(gigatoken))), TEXTS)


SCRIPTS = [
    (0x20, 0x7E), (0xA0, 0x2FF), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x8FF), (0x900, 0xFFF),
    (0x1000, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0xF900, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x33500),
]  # fmt: skip
CHARACTERS = st.one_of(*(st.integers(*script).map(chr) for script in SCRIPTS))
WORDS = st.one_of(
    st.lists(CHARACTERS, max_size=9).map("".join),
    st.sampled_from([" ", "  ", "\n", "\t", "\r\n", "'s", "1", "12345", "the", "<|endoftext|>"]),
)


@pytest.mark.parametrize("kind", KINDS)
def test_random_text_of_every_script_has_the_same_ids(load, kind):
    pair = pair_of(load, kind)

    @given(st.lists(st.lists(WORDS, max_size=30).map("".join), min_size=1, max_size=4))
    def check(texts):
        assert_same(pair, texts)

    check()


@pytest.mark.slow
def test_all_undisputed_code_points_have_the_same_ids(load):
    """Test each beside letters, digits, an apostrophe and combining marks."""
    library, gigatoken = pair_of(load, "qwen3")
    places = (*range(0xD800), *range(0xF900, 0x40000), *range(0xE0000, 0xE0200))
    texts = (
        f"{c}'s x{c}\u0316\u0301{c} 1{c}\u3099\u0591{c}s {c}{c}.{c}".encode()
        for c in map(chr, places)
    )
    while some := list(itertools.islice(texts, 5000)):
        known = [t for t, is_not in zip(some, texts_with_disputed(some), strict=True) if not is_not]
        assert_same_batch(library, gigatoken, known)


def assert_same_batch(library, gigatoken, texts):
    expected, found = (e.encode(texts, [False] * len(texts))[0] for e in (library, gigatoken))
    assert np.array_equal(found, expected)


@given(st.lists(st.text(max_size=6), max_size=5), st.sampled_from(DISPUTED), st.booleans())
def test_texts_with_disputed_characters_are_found(texts, disputed, is_last):
    """Compare with a search character by character."""
    texts = [*texts, f"a{chr(disputed[is_last])}b", "plain"]
    expected = [any(a <= ord(c) <= b for c in text for a, b in DISPUTED) for text in texts]
    assert texts_with_disputed([text.encode() for text in texts]).tolist() == expected


# --- choosing an encoder -------------------------------------------------------------------------


def test_gigatoken_is_chosen_where_it_is_installed(load):
    chosen, why = choose_encoder(load("bytes"))
    assert chosen.name.startswith("gigatoken ")
    assert not why
    assert chosen.compared > len(module.PROBES)


def test_without_gigatoken_the_library_encodes(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    chosen, why = choose_encoder(load("bytes"))
    assert (chosen.name, why) == (f"tokenizers {tokenizers.__version__}", "")
    with pytest.raises(ConfigError, match="--encoder gigatoken: not installed"):
        choose_encoder(load("bytes"), "gigatoken")


def test_a_tokenizer_that_gigatoken_does_not_know_goes_to_the_library(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<eos>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    chosen, why = choose_encoder(load_tokenizer(str(tmp_path)))
    assert chosen.name.startswith("tokenizers ")
    assert "doesn't know this tokenizer" in why
    with pytest.raises(ConfigError, match=r"--encoder gigatoken: .*; leave it out"):
        choose_encoder(load_tokenizer(str(tmp_path)), "gigatoken")


class Wrong:
    """gigatoken with one wrong id in texts that name a fault."""

    def __init__(self, real):
        self.real = real

    def encode_batch(self, texts, *, parallel):
        assert not parallel
        made = self.real.encode_batch(texts, parallel=False)
        offsets, ids = (np.asarray(a.data) for a in (made.layout.offsets, made.layout.content))
        for text, start in zip(texts, offsets, strict=False):
            if b"fault" in text:
                ids[start] += 1
        return made


@pytest.fixture
def faulty(monkeypatch):
    rust = importlib.import_module("gigatoken.gigatoken_rs")
    real = rust.load_hf_json
    monkeypatch.setattr(rust, "load_hf_json", lambda text: Wrong(real(text)))


def test_a_difference_in_the_probes_leaves_gigatoken_out(load, faulty, monkeypatch):
    monkeypatch.setattr(module, "PROBES", ("one fault",))
    chosen, why = choose_encoder(load("bytes"))
    assert chosen.name.startswith("tokenizers ")
    assert why == "gigatoken gives other ids for 'one fault'"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_difference_in_the_corpus_makes_the_library_do_all_again(
    tmp_path, make, write_documents, contents, faulty, monkeypatch, workers
):
    monkeypatch.setattr(pipeline, "SMALL", 0)
    monkeypatch.setattr(pipeline, "TASK_BYTES", 1000)
    monkeypatch.setattr(module, "BYTES_A_SAMPLE", 1)
    texts = [f"Text {number} of the corpus. " * 9 for number in range(60)]
    corpus = write_documents(tmp_path / "corpus", [*texts, *(f"fault {n}" for n in range(99))])
    result = make(corpus, tmp_path / "made", workers=workers)
    assert result.encoding.encoder.startswith("tokenizers ")
    assert result.encoding.why_not_gigatoken.startswith("gigatoken gave other ids for 'fault ")
    make(corpus, tmp_path / "straight", encoder="tokenizers")
    assert contents(tmp_path / "made") == contents(tmp_path / "straight")
    recorded = json.loads((tmp_path / "made/encoding.json").read_text())
    assert recorded == result.encoding.model_dump()


def test_asked_by_name_gigatoken_is_not_replaced(
    tmp_path, make, write_documents, faulty, monkeypatch
):
    monkeypatch.setattr(module, "BYTES_A_SAMPLE", 1)
    corpus = write_documents(tmp_path / "corpus", ["a fault"])
    with pytest.raises(
        DataError, match="other ids for 'a fault'; run the command again with --enc"
    ):
        make(corpus, tmp_path / "made", encoder="gigatoken")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "llama2"])
def test_both_encoders_make_the_same_dataset(
    tmp_path, load, make, write_documents, contents, monkeypatch, kind
):
    load(kind)  # skips without its file
    monkeypatch.setattr(pipeline, "TASK_BYTES", 3000)
    monkeypatch.setattr("pretrain_cli.data.tokenizing.blocks.BLOCK_CHARACTERS", 2000)
    texts = [f"Text {number}: {'äöü and words, ' * (number % 50)}\n" for number in range(200)]
    corpus = write_documents(tmp_path / "corpus", [*texts, " ".join(texts), *TEXTS[1:]])
    for encoder in ("tokenizers", "gigatoken"):
        result = make(corpus, tmp_path / encoder, tokenizer=kind, encoder=encoder, val_fraction=0.1)
    assert result.encoding.samples_compared == len(module.PROBES) + 2  # the named tokens, a sample
    assert contents(tmp_path / "gigatoken") == contents(tmp_path / "tokenizers")


def test_a_difference_is_told_with_a_short_text():
    assert module.shortened("a\n" * 50) == repr("a\n" * 29 + "a…")
    assert str(EncodersDiffer("text")) == "text"
