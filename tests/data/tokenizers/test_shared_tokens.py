"""Shared tokens against what the tokenizers themselves decode."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pretrain_cli.data.tokenizers.shared_tokens import shared_tokens
from pretrain_cli.data.tokenizers.tokenizer import read_tokenizer

ALL = 2**31


def texts(tokenizer):
    """Return the text of each id that is not special, as the tokenizer decodes it behind an "a".
    Parts of characters and fallback bytes are left out, and so are Gemma's added ▁, whose ids are
    also runs of spaces."""
    spec = json.loads(tokenizer.json)
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    anchor = tokenizer.backend.token_to_id("a")
    pairs = tokenizer.backend.get_vocab().items()
    ids = [id for name, id in pairs if name not in special and name[:3] != "<0x"]
    decoded = tokenizer.backend.decode_batch([[anchor, id] for id in ids])
    return {
        id: text[1:]
        for id, text in zip(ids, decoded, strict=True)
        if "\ufffd" not in text and "▁" not in text
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("gpt2", "llama2"),
        ("llama2", "gpt2"),
        pytest.param("gemma3", "qwen3", marks=pytest.mark.slow),
        pytest.param("qwen3", "gemma3", marks=pytest.mark.slow),
    ],
)
def test_shared_tokens_are_those_that_decode_to_the_same_text(load, old, new):
    shared = shared_tokens(load(old), load(new), old_rows=ALL)
    before, after = texts(load(old)), texts(load(new))
    pairs = list(zip(shared.new.tolist(), shared.old.tolist(), strict=True))
    differ = [(n, o) for n, o in pairs if n in after and o in before and after[n] != before[o]]
    assert not differ
    common = set(before.values())
    ids = set(shared.new.tolist())
    missed = {id: text for id, text in after.items() if text in common and id not in ids}
    assert not missed
    assert shared.added == len(load(new).backend.get_vocab()) - len(pairs)


@pytest.mark.parametrize("name", ["gpt2", "llama2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_tokenizer_shares_every_token_with_itself(load, name):
    shared = shared_tokens(load(name), load(name), old_rows=ALL)
    assert shared.new.tolist() == shared.old.tolist() == shared.all_old.tolist()
    assert (shared.added, shared.dropped) == (0, 0)


def test_tokens_without_a_row_are_not_shared(load):
    shared = shared_tokens(load("bytes"), load("bytes"), old_rows=100)
    assert shared.new.tolist() == list(range(100))
    assert shared.added == 157
    assert len(shared.all_old) == 100


def test_the_end_of_a_document_keeps_its_row_under_another_name(load):
    llama, gpt = load("llama2"), load("gpt2")
    shared = shared_tokens(llama, gpt, old_rows=ALL)
    assert dict(zip(shared.new, shared.old, strict=True))[gpt.eos] == llama.eos == 2


def saved(backend, folder, eos):
    """Return the tokenizer that is read from a file with this one and its end token."""
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return read_tokenizer(folder / "tokenizer.json", name=folder.name)


@pytest.fixture
def metaspace(tmp_path):
    """Tokenizer in SentencePiece's manner, with `_` for a space, three byte tokens, a special token
    and an added one."""
    words = ["<0x61>", "<0xC3>", "<0x0A>", "_a", "a", "é", "_", "_the"]
    backend = Tokenizer(
        models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[], byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_")
    backend.decoder = decoders.Metaspace(replacement="_")
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("_the_", special=False, normalized=False)])
    return saved(backend, tmp_path / "metaspace", "</s>")


def test_bytes_and_characters_are_told_apart(load, metaspace):
    """A fallback byte takes the row of the byte-level token of that byte, and in the other
    direction a character comes before its byte."""
    shared = shared_tokens(load("bytes"), metaspace, old_rows=ALL)
    found = dict(zip(shared.new.tolist(), shared.old.tolist(), strict=True))
    assert found == {0: 0x61, 1: 0xC3, 2: 0x0A, 4: 0x61, 6: 0x20, 8: 256}
    assert shared.texts == 5
    back = shared_tokens(metaspace, load("bytes"), old_rows=ALL)
    found = dict(zip(back.new.tolist(), back.old.tolist(), strict=True))
    assert found == {0x61: 4, 0xC3: 1, 0x0A: 2, 0x20: 6, 256: 8}
    assert back.dropped == 5  # <0x61>, " a", "é", " the", the added one


def test_an_added_token_is_its_literal_text(metaspace, tmp_path):
    """`_the_` is an added token there: with its underscores, not with spaces."""
    words = [" the ", "_the_", "</s>"]
    backend = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, "</s>"))
    plain = saved(backend, tmp_path / "plain", "</s>")
    shared = shared_tokens(metaspace, plain, old_rows=ALL)
    assert dict(zip(shared.new.tolist(), shared.old.tolist(), strict=True)) == {1: 9, 2: 8}


def test_a_special_token_is_not_the_text_of_its_name(tmp_path):
    words = ["x", "<sep>", "</s>"]
    vocab = {word: id for id, word in enumerate(words)}
    one = Tokenizer(models.WordLevel(vocab, "x"))
    one.normalizer = normalizers.NFC()
    other = Tokenizer(models.WordLevel(vocab, "x"))
    other.add_special_tokens([AddedToken("<sep>", special=True)])
    shared = shared_tokens(
        saved(one, tmp_path / "one", "</s>"), saved(other, tmp_path / "other", "</s>"), old_rows=ALL
    )
    assert shared.new.tolist() == [0, 2]
