"""All kinds of tokenizers: published ids, document marks, lossless decoding, and files."""

import importlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.tokenizers.tokenizer import HUB, load_tokenizer, read_tokenizer, train_bpe
from pretrain_cli.errors import ConfigError, DataError
from tests.data.conftest import encode_documents

KINDS = [*HUB, "bytes", "bpe"]
# name: BOS, EOS, vocabulary size, ids of "Hello world" without marks; from the published files
PUBLISHED = {
    "gemma3": (2, 1, 262_145, [9259, 1902]),
    "qwen3": (None, 151_643, 151_669, [9707, 1879]),
    "gpt2": (None, 50_256, 50_257, [15496, 995]),
    "llama2": (1, 2, 32_000, [15043, 3186]),
}
# In Unicode normal form C, because Qwen normalizes text to it; without U+2581, Gemma's space.
TEXTS = [
    "Hello world",
    "  leading, trailing \t ",
    "line ends \n of \r\n every \r kind\n\n\n",
    "def f(x):\n\treturn x  # tabs\n\n    and = 'spaces'",
    "naïve café — “quoted” № 1234567890 ½",
    "你好，世界 こんにちは 안녕 שלום مرحبا",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f9ff",
    "nul \x00 escape \x1b delete \x7f mark \ufeff zero \u200b wide",
    "<|endoftext|><|im_end|> <think> <bos><eos> </s> <pad> <unk> <image_soft_token>",
]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_tokenizers_have_their_published_ids(load, kind):
    bos, eos, size, hello = PUBLISHED[kind]
    tokenizer = load(kind)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (bos, eos, size)
    before = [] if bos is None else [bos]
    assert encode_documents(tokenizer, ["Hello world"]) == [[*before, *hello, eos]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_returns_the_original_document(load, kind, text):
    tokenizer = load(kind)
    (ids,) = encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_typed_in_a_text_stay_text(load, kind):
    tokenizer = load(kind)
    names = json.loads(tokenizer.json)["added_tokens"]
    specials = {token["id"] for token in names if token["special"]}
    text = " ".join(token["content"] for token in names if token["special"])
    (ids,) = encode_documents(tokenizer, [f"typed {text} here"])
    marks = [tokenizer.eos] if tokenizer.bos is None else [tokenizer.bos, tokenizer.eos]
    assert [i for i in ids if i in specials] == marks
    assert ids[-1] == tokenizer.eos


@pytest.mark.parametrize("kind", KINDS)
def test_a_documents_ids_do_not_depend_on_its_batch(load, kind):
    tokenizer = load(kind)
    assert encode_documents(tokenizer, TEXTS) == [
        ids for text in TEXTS for ids in encode_documents(tokenizer, [text])
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_begins_like_a_document(load, kind):
    tokenizer = load(kind)
    (ids,) = encode_documents(tokenizer, ["The start"])
    assert tokenizer.encode_prompt("The start") == ids[:-1]
    # without a BOS token, a document begins after the EOS token of the previous one
    begin = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
    assert tokenizer.encode_prompt("") == [begin]


@given(st.text())
def test_ids_of_the_bytes_tokenizer_are_the_bytes(text):
    tokenizer = load_tokenizer("bytes")
    assert encode_documents(tokenizer, [text]) == [[*text.encode(), 256]]
    assert tokenizer.decode([*text.encode(), 256]) == text


def test_the_bytes_tokenizer_has_256_bytes_and_an_end_mark():
    tokenizer = load_tokenizer("bytes")
    numbers = (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.pad)
    assert numbers == (257, None, 256, None)


@given(text=st.text())
def test_a_trained_bpe_decodes_any_text_losslessly(load, text):
    tokenizer = load("bpe")  # its training text is ASCII
    (ids,) = encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids) == text


def test_a_trained_bpe_has_the_given_size_and_merges_frequent_pairs():
    words = " ".join(f"word{number}" for number in range(400))
    tokenizer = train_bpe([words] * 3, 300)
    assert tokenizer.vocab_size == 300
    (ids,) = encode_documents(tokenizer, [" word word"])
    assert len(ids) == 3  # two words and the end mark


def test_a_bpe_vocabulary_below_257_is_refused():
    with pytest.raises(ConfigError, match=r"--vocab-size: 256 is too small.*at least 257"):
        train_bpe(["text"], 256)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_a_saved_tokenizer_with_the_same_ids(load, tmp_path, kind, model_type):
    """The folder has a config.json, whose model type transformers would otherwise use to choose a
    class."""
    tokenizer = load(kind)
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = importlib.import_module("transformers").AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:-1]:
        ids = theirs(text).input_ids
        assert ids == tokenizer.encode_prompt(text)
        assert theirs.decode(ids, skip_special_tokens=True) == text
    marks = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert marks == (tokenizer.bos, tokenizer.eos, tokenizer.pad)
    assert len(theirs) == tokenizer.vocab_size


def test_a_saved_tokenizer_is_read_back_unchanged(load, tmp_path):
    tokenizer = load("bpe")
    tokenizer.save(tmp_path)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(str(name))
        assert again.fingerprint == tokenizer.fingerprint
        assert encode_documents(again, TEXTS) == encode_documents(tokenizer, TEXTS)


def test_a_published_tokenizer_is_searched_in_the_folder_first(tmp_path, monkeypatch):
    load_tokenizer("bytes").save(_made(tmp_path / "gpt2"))
    monkeypatch.setenv("PRETRAIN_TOKENIZERS", str(tmp_path))
    assert load_tokenizer("gpt2").json == load_tokenizer("bytes").json


def test_a_published_tokenizer_is_searched_in_the_hub_cache_next(tmp_path, monkeypatch):
    repository = tmp_path / "models--openai-community--gpt2"
    load_tokenizer("bytes").save(_made(repository / "snapshots" / ("0" * 40)))
    _made(repository / "refs").joinpath("main").write_text("0" * 40)
    monkeypatch.delenv("PRETRAIN_TOKENIZERS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_tokenizer("gpt2").json == load_tokenizer("bytes").json


@pytest.mark.parametrize("name", [*HUB, "someone/model"])
def test_the_error_without_a_network_names_the_alternatives(tmp_path, monkeypatch, name):
    monkeypatch.delenv("PRETRAIN_TOKENIZERS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError) as error:
        load_tokenizer(name)
    message = str(error.value)
    assert message.startswith(f"tokenizer '{name}': ")
    assert "can't be reached" in message
    assert "path of a tokenizer.json" in message
    assert "'bytes'" in message
    assert (f"$PRETRAIN_TOKENIZERS/{name}/tokenizer.json" in message) == (name in HUB)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "is gated: accept its licence on the hub and run 'hf auth login'"),
        ("RepositoryNotFoundError", "the hub has no tokenizer.json in .*: check the name"),
        ("RemoteEntryNotFoundError", "the hub has no tokenizer.json in .*: check the name"),
        ("LocalEntryNotFoundError", "can't be reached"),
    ],
)
def test_each_hub_error_gives_a_message_with_the_reason(tmp_path, monkeypatch, kind, said):
    error = getattr(huggingface_hub.errors, kind)

    def refuse(*_, **__):
        raise error.__new__(error)  # __init__ would need an HTTP response

    monkeypatch.delenv("PRETRAIN_TOKENIZERS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(DataError, match=said):
        load_tokenizer("gemma3")


@pytest.mark.parametrize(
    ("name", "nearest"), [("gemma", "gemma3"), ("qwen", "qwen3"), ("byte", "bytes"), ("BPE2", "")]
)
def test_the_error_for_an_unknown_name_suggests_the_nearest_one(name, nearest):
    with pytest.raises(ConfigError) as error:
        load_tokenizer(name)
    message = str(error.value)
    assert message.startswith(f"tokenizer '{name}' is not one of gemma3, qwen3, gpt2, llama2, ")
    assert message.endswith(f"did you mean {nearest}?" if nearest else "a path or a hub id")


@pytest.mark.parametrize(
    "name", ["nowhere/at/all", "./nowhere", "nowhere.json", "here", "here/below", "/nowhere"]
)
def test_a_path_without_a_tokenizer_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such tokenizer file; give a tokenizer\.json"):
        load_tokenizer(name)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2", b"words", b"\xff\xfe\x00"])
def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not (a tokenizer\.json|UTF-8)"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_config_can_name_the_end_of_document_token(tmp_path):
    """The name is a string or, in older files, an object."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[SEP]": 1}, "a"))
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    with pytest.raises(DataError, match="no end-of-document token; name one as eos_token"):
        read_tokenizer(path, name="words")
    for named in ("[SEP]", {"content": "[SEP]", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert read_tokenizer(path, name="words").eos == 1


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path):
    backend = tokenizers.Tokenizer.from_str(load_tokenizer("bytes").json)
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=8, pad_id=0, pad_token="!")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert encode_documents(tokenizer, ["seven b", "x"]) == [[*b"seven b", 256], [*b"x", 256]]


def _made(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
