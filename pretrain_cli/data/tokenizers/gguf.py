"""Tokenizer metadata of a GGUF file, from which llama.cpp produces the same tokens.

    llama   BPE on characters, with ▁ for a space and byte tokens for characters outside the
            vocabulary (gemma3, llama2). Of all pairs that form a token, the one with the highest
            score is merged; scores are the order of the merges.
    gpt2    BPE on bytes (gpt2, qwen3, bytes, bpe), with its merges. The pattern that splits text
            into words is not in the file: llama.cpp has named patterns built in.

Any other tokenizer is refused, because llama.cpp would produce other tokens.

The ▁ in added tokens such as Gemma's ▁▁ is a typed ▁, not a space. Runs of spaces come from merges,
so these tokens are written as normal ones. (llama.cpp's own converter does otherwise.)

Some behaviour is fixed in llama.cpp: it reads a typed ▁ as a space, and it makes control tokens of
tokens that look like an end mark or a fill-in-the-middle mark. A typed </s> in Gemma's HTML and
Qwen's <|fim_prefix|> are therefore several tokens.
"""

import json
import re
from itertools import pairwise
from typing import Any

from pretrain_cli.data.tokenizers.tokenizer import WORDS, Tokenizer
from pretrain_cli.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's token types. In a text, user-defined tokens are matched before all others, and
control tokens are never matched."""

SPACE = "▁"
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
SPACED = (
    (TO_SPACE, False),
    ({"type": "Sequence", "normalizers": [PREPEND, TO_SPACE]}, True),
)
"""Normalizers of the `llama` kind, and whether they put a space before a text."""

GPT2_WORDS = "gpt2"
QWEN_WORDS = WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
PATTERNS = {
    (GPT2_WORDS, False): "gpt-2",
    (QWEN_WORDS, False): "qwen2",
    (WORDS, False): "dbrx",
    (WORDS, True): "llama-bpe",
}
"""llama.cpp's names of word patterns. Keys are (pattern, `ignore_merges`); with `ignore_merges`, a
word that is a token is taken whole."""
NO_MERGE = "<| |>"
"""Merge that matches no two tokens, for a tokenizer without merges: llama.cpp requires the list."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def gguf_tokenizer(tokenizer: Tokenizer, rows: int) -> tuple[dict[str, Any], list[str]]:
    """Return the tokenizer's metadata for a model with this many embedding rows, and notices for
    the user. Raises ConfigError for a tokenizer that llama.cpp does not support."""
    spec = json.loads(tokenizer.json)
    model = spec["model"]
    if model.get("type") != "BPE":
        raise _refused(tokenizer, f"it is a {model.get('type')} model, not a BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refused(tokenizer, f"its {name} is '{model[name]}'")
    texts, kinds = _tokens(tokenizer, spec, rows)
    facts: dict[str, Any] = {"tokens": texts, "token_type": kinds}
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if model.get("byte_fallback"):
        facts |= _of_characters(tokenizer, spec, kinds, merges)
    else:
        facts |= _of_bytes(tokenizer, spec, merges)
    # the token of an empty prompt; see Tokenizer.encode_prompt
    begin = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    ids = {"bos": begin, "eos": tokenizer.eos, "padding": tokenizer.pad}
    ids["unknown"] = tokenizer.backend.token_to_id(model.get("unk_token") or "")
    facts |= {f"{name}_token_id": id for name, id in ids.items() if id is not None and id < rows}
    facts |= {"add_bos_token": tokenizer.bos is not None, "add_eos_token": False}
    return {f"tokenizer.ggml.{key}": value for key, value in facts.items()}, _notices(
        tokenizer, spec, rows
    )


def _tokens(tokenizer: Tokenizer, spec: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return text and kind of each id that the model has a row for."""
    texts = [f"[PAD{id}]" for id in range(rows)]
    kinds = [UNUSED] * rows
    unknown = spec["model"].get("unk_token")
    falls_back = bool(spec["model"].get("byte_fallback"))
    for text, id in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if id < rows:
            texts[id] = text
            is_byte = falls_back and BYTE_TOKEN.fullmatch(text)
            kinds[id] = UNKNOWN if text == unknown else BYTE if is_byte else NORMAL
    for added in spec["added_tokens"]:
        if added["id"] >= rows or added["content"] == unknown:
            continue
        if added["special"]:
            kinds[added["id"]] = CONTROL
        elif not (falls_back and SPACE in added["content"]):
            for name in ("single_word", "lstrip", "rstrip"):
                if added[name]:
                    raise _refused(tokenizer, f"{name} is set for its token '{added['content']}'")
            kinds[added["id"]] = USER_DEFINED
    return texts, kinds


def _of_characters(
    tokenizer: Tokenizer, spec: dict[str, Any], kinds: list[int], merges: list[list[str]]
) -> dict[str, Any]:
    spaced = [prefix for normalizer, prefix in SPACED if normalizer == spec["normalizer"]]
    split = spec["pre_tokenizer"]  # splits at spaces, all replaced by ▁ before
    if not spaced or not (split is None or split.get("pattern") == {"String": " "}):
        raise _refused(tokenizer, "its normalizer or pre-tokenizer is not SentencePiece's")
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    order: dict[str, tuple[int, int]] = {}
    for rank, (left, right) in enumerate(merges):
        first, _ = order.get(left + right, (rank, rank))
        order[left + right] = first, rank
    # Merge ranks of tokens that repeat one character may overlap. This changes nothing, because a
    # run of one character is merged from its left.
    ranges = sorted(found for text, found in order.items() if len(set(text)) > 1)
    if any(later[0] < earlier[1] for earlier, later in pairwise(ranges)):
        raise _refused(tokenizer, "its merges are not in the order of the tokens they make")
    missing = _unmerged(vocab, kinds, {(left, right) for left, right in merges})
    if missing is not None:
        raise _refused(tokenizer, f"it doesn't merge {missing[0]!r} and {missing[1]!r}")
    scores = [0.0] * len(kinds)
    for text, (first, _) in order.items():
        if vocab[text] < len(scores):
            scores[vocab[text]] = -float(first)
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": spaced[0]}


def _unmerged(
    vocab: dict[str, int], kinds: list[int], merges: set[tuple[str, str]]
) -> tuple[str, str] | None:
    """Return two tokens that form a third without being a merge, which llama.cpp would merge; None
    if there are none."""
    pieces = {text for text, id in vocab.items() if id < len(kinds) and kinds[id] == NORMAL}
    for text in pieces:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair[0] in pieces and pair[1] in pieces and pair not in merges:
                return pair
    return None


def _of_bytes(
    tokenizer: Tokenizer, spec: dict[str, Any], merges: list[list[str]]
) -> dict[str, Any]:
    if (spec["normalizer"] or {}).get("type", "NFC") != "NFC":
        raise _refused(tokenizer, f"its normalizer is {spec['normalizer']['type']}")
    words = _words(spec["pre_tokenizer"] or {})
    if not merges:
        words = GPT2_WORDS  # any pattern will do, because nothing is merged
    name = PATTERNS.get((words or "", bool(spec["model"].get("ignore_merges"))))
    if name is None:
        raise _refused(tokenizer, "it splits texts into words by a pattern of its own")
    joined = [f"{left} {right}" for left, right in merges]
    return {"model": "gpt2", "pre": name, "merges": joined or [NO_MERGE]}


def _words(pre_tokenizer: dict[str, Any]) -> str | None:
    """Return the pattern that splits text into words; None for an unsupported kind."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return GPT2_WORDS
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(words)}, "behavior": "Isolated",
                 "invert": False},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        }:  # fmt: skip
            return words
        case _:
            return None


def _notices(tokenizer: Tokenizer, spec: dict[str, Any], rows: int) -> list[str]:
    beyond = sorted(
        text
        for text, id in tokenizer.backend.get_vocab(with_added_tokens=True).items()
        if id >= rows
    )
    said = []
    if beyond:
        said.append(f"Tokens beyond the model's {rows:,} rows are left out: {', '.join(beyond)}")
    if (spec["normalizer"] or {}).get("type") == "NFC":
        said.append("The tokenizer composes accents (NFC) before it splits; llama.cpp does not")
    return said


def _refused(tokenizer: Tokenizer, reason: str) -> ConfigError:
    return ConfigError(
        f"--gguf: llama.cpp can't have the tokenizer '{tokenizer.name}': {reason}; without --gguf "
        "this model can be exported"
    )
