"""GGUF tokenizers: llama.cpp produces the same tokens, or the tokenizer is refused.

`as_llama_cpp` reimplements llama.cpp's merging by scores, so that most tests run without llama.cpp.
Where llama.cpp is installed, its own tokens are compared too.
"""

import ctypes
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from pretrain_cli.data.tokenizers.gguf import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED
from pretrain_cli.data.tokenizers.gguf import gguf_tokenizer as described
from pretrain_cli.data.tokenizers.tokenizer import HUB, Tokenizer, read_tokenizer, train_bpe
from pretrain_cli.errors import ConfigError
from tests.data.tokenizers.test_tokenizer import TEXTS

LINES = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps",
    "def function(value):\n        return value + 1  # a comment\n",
    "a  b   c    d" + " " * 40 + "e\n\n\nf\t\tg",
    "naïve café, 12345 numbers; it's they'll WE'RE",
]
WORDS = [" ", "  ", "\n", "\n\n", "\t", "the", "The", "don't", "1234", "é", "日", "=", "->", "x"]


def spm_like(tmp_path: Path) -> Tokenizer:
    """Return a small tokenizer like Gemma's: ▁ for spaces, byte tokens, and every pair of tokens
    that forms a token is a merge. The order of the merges is not the order of the ids."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, show_progress=False)
    corpus = [*LINES * 3, *(Path(random.__file__).read_text()[:20_000]).split("\n")]
    learner.train_from_iterator([line.replace(" ", "▁") for line in corpus], trainer)
    spec = json.loads(learner.to_str())["model"]
    made = ["".join(pair) for pair in spec["merges"]]
    characters = sorted({c for line in corpus for c in line.replace(" ", "▁")})
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)),
              "<b>", "▁▁▁▁", *characters]  # fmt: skip
    pieces += [text for text in reversed(made) if text != "▁▁▁▁"]
    vocab = {text: id for id, text in enumerate(pieces)}
    merges = []
    for text in made:
        cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += [list(cut) for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = dict.fromkeys(range(4), True) | {vocab["<b>"]: False, vocab["▁▁▁▁"]: False}
    whole = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": id, "content": pieces[id], **added, "special": is_special}
                         for id, is_special in special.items()],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": None,
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "ignore_merges": False, "vocab": vocab, "merges": merges},
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(whole))
    return read_tokenizer(path, name="spm-like")


def as_llama_cpp(facts: dict[str, Any], text: str) -> list[int]:
    """Return the tokens of a text by llama.cpp's rules for the kind `llama`.

    User-defined tokens are cut out first, the longest first. In the rest, the two neighbours that
    form the token with the highest score are merged repeatedly, the leftmost of equals first.
    Characters without a token become bytes."""
    texts, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    ids = {text: id for id, text in enumerate(texts)}
    scores = facts["tokenizer.ggml.scores"]
    defined = [text for text, kind in zip(texts, kinds, strict=True) if kind == USER_DEFINED]
    for found in sorted(defined, key=len, reverse=True):
        if found in text:
            before, _, after = text.partition(found)
            left, right = as_llama_cpp(facts, before), as_llama_cpp(facts, after)
            return [*left, ids[found], *right]
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [
            (scores[ids[a + b]], -place)
            for place, (a, b) in enumerate(pairwise(symbols))
            if a + b in ids
        ]
        if not pairs:
            break
        place = -max(pairs)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    found_ids = []
    for symbol in symbols:
        as_bytes = [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        found_ids += [ids[symbol]] if symbol in ids else as_bytes
    return found_ids


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


def test_merging_by_scores_gives_the_same_tokens_as_the_merges(tmp_path):
    tokenizer = spm_like(tmp_path)
    facts, said = described(tokenizer, tokenizer.vocab_size)
    assert not said
    assert facts["tokenizer.ggml.add_space_prefix"] is False
    shuffled = random.Random(5)
    texts = [*LINES, "<b> bold <b><eos>", "日本 ☃"]
    for _ in range(200):
        texts.append("".join(shuffled.choices(WORDS, k=30)))
    for text in texts:
        assert as_llama_cpp(facts, text) == encoded(tokenizer, text), text


def test_tokens_have_the_token_types_of_llama_cpp(tmp_path):
    tokenizer = spm_like(tmp_path)
    facts, said = described(tokenizer, tokenizer.vocab_size + 2)
    texts, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    of = dict(zip(texts, kinds, strict=True))
    assert (of["<bos>"], of["<b>"], of["<0x0A>"]) == (CONTROL, USER_DEFINED, BYTE)
    assert of["▁▁▁▁"] == of["▁▁"] == NORMAL  # a typed ▁, not spaces
    assert kinds[-2:] == [UNUSED, UNUSED]
    assert len(set(texts)) == len(texts)
    ids = {key.split(".")[-1]: value for key, value in facts.items() if key.endswith("_id")}
    assert ids == {
        "bos_token_id": 2, "eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 3
    }  # fmt: skip
    assert facts["tokenizer.ggml.add_bos_token"] is True
    assert not said


@pytest.mark.parametrize(
    ("kind", "model", "pre", "begins"),
    [
        ("gemma3", "llama", "default", 2),
        ("llama2", "llama", "default", 1),
        ("gpt2", "gpt2", "gpt-2", None),
        ("qwen3", "gpt2", "qwen2", None),
        ("bytes", "gpt2", "gpt-2", None),
        ("bpe", "gpt2", "dbrx", None),
    ],
)
def test_each_supported_tokenizer_has_its_gguf_model_and_pattern(load, kind, model, pre, begins):
    tokenizer = load(kind)
    facts, _ = described(tokenizer, tokenizer.vocab_size)
    assert facts["tokenizer.ggml.model"] == model
    assert facts["tokenizer.ggml.pre"] == pre
    assert facts["tokenizer.ggml.add_bos_token"] == (begins is not None)
    assert facts["tokenizer.ggml.bos_token_id"] == (begins or tokenizer.eos)
    tokens = facts["tokenizer.ggml.tokens"]
    assert [tokenizer.backend.token_to_id(text) for text in tokens] == list(range(len(tokens)))


@pytest.mark.parametrize("kind", ["gemma3", "llama2"])
def test_scores_of_published_tokenizers_give_the_same_tokens(load, kind):
    tokenizer = load(kind)
    facts, _ = described(tokenizer, tokenizer.vocab_size)
    prefix = " " if kind == "llama2" else ""
    for text in [*TEXTS[:-1], *LINES]:
        assert as_llama_cpp(facts, prefix + text) == encoded(tokenizer, text), text


def test_a_notice_names_tokens_without_an_embedding_row(load):
    tokenizer = load("gemma3")
    facts, said = described(tokenizer, 262_144)
    assert len(facts["tokenizer.ggml.tokens"]) == 262_144
    assert said == ["Tokens beyond the model's 262,144 rows are left out: <image_soft_token>"]


def changed(tokenizer: Tokenizer, tmp_path: Path, **parts: Any) -> Tokenizer:
    spec = json.loads(tokenizer.json)
    for name, value in parts.items():
        place = spec["model"] if name in spec["model"] else spec
        place[name] = value(place[name]) if callable(value) else value
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(spec))
    return read_tokenizer(path, name="changed")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"merges": lambda merges: merges[:-1]}, "it doesn't merge"),
        ({"merges": lambda merges: merges[::2] + merges[1::2]}, "not in the order"),
        ({"normalizer": {"type": "NFKC"}}, "is not SentencePiece's"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "is not SentencePiece's"),
    ],
)
def test_a_tokenizer_that_llama_cpp_merges_differently_is_refused(tmp_path, parts, said):
    with pytest.raises(ConfigError, match=f"tokenizer 'changed'.*{said}"):
        described(changed(spm_like(tmp_path), tmp_path, **parts), 1000)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "by a pattern of its own"),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer is Lowercase"),
        ({"ignore_merges": True, "pre_tokenizer": {"type": "ByteLevel", "use_regex": True,
          "add_prefix_space": False, "trim_offsets": True}}, "by a pattern of its own"),
        ({"added_tokens": lambda added: [added[0] | {"special": False, "lstrip": True}]},
         "lstrip is set for its token '<|endoftext|>'"),
    ],
)  # fmt: skip
def test_a_word_split_that_llama_cpp_lacks_is_refused(tmp_path, parts, said):
    tokenizer = train_bpe(LINES, 280)
    with pytest.raises(ConfigError, match=said.replace("|", r"\|")):
        described(changed(tokenizer, tmp_path, **parts), 300)


# --- llama.cpp itself -----------------------------------------------------------------------------


@pytest.fixture
def llama_tokens(tmp_path: Path) -> Callable[[dict[str, Any]], Callable[[str], list[int]]]:
    """Function that returns llama.cpp's tokenizer, loaded from a GGUF file with only a vocabulary.
    Special tokens are plain text."""
    gguf = pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    values = gguf.GGUFValueType
    kinds = {bool: values.BOOL, int: values.UINT32, str: values.STRING, list: values.ARRAY}

    def make(facts: dict[str, Any]) -> Callable[[str], list[int]]:
        path = tmp_path / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in facts.items():
            writer.add_key_value(key, value, kinds[type(value)])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        vocab = llama_cpp.llama_model_get_vocab(model)

        def tokens(text: str) -> list[int]:
            data = text.encode()
            out = (llama_cpp.llama_token * (len(data) + 2))()
            count = llama_cpp.llama_tokenize(vocab, data, len(data), out, len(out), False, False)
            assert count >= 0
            return list(out[:count])

        tokens.keep = quiet  # pyright: ignore[reportFunctionMemberAccess]
        return tokens

    return make


@pytest.mark.parametrize("kind", [*HUB, "bytes", "bpe", "spm-like"])
def test_llama_cpp_makes_the_same_tokens(load, llama_tokens, tmp_path, kind):
    tokenizer = spm_like(tmp_path) if kind == "spm-like" else load(kind)
    facts, _ = described(tokenizer, tokenizer.vocab_size)
    tokens = llama_tokens(facts)
    shuffled = random.Random(3)
    texts = [*TEXTS[:-1], *LINES, Path(tokenizers.__file__).read_text()[:5000]]
    for _ in range(300):
        words = shuffled.choices(
            [
                " ",
                "  ",
                "\n",
                "\n\n",
                "\t",
                "the",
                "The",
                "don't",
                "1234",
                "é",
                "日",
                "=",
                "->",
                "x",
            ],
            k=20,
        )
        texts.append("".join(words))
    for text in texts:
        if "\x00" not in text:
            assert tokens(text) == encoded(tokenizer, text), repr(text)
