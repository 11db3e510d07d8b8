"""Tokens that two tokenizers share.

Tokens are matched by the bytes of the text that they stand for, because tokenizers spell these
differently:

    tokenizer                            " né"    the byte C3    found by
    byte-level (gpt2, qwen3, bpe)        ĠnÃ©     Ã              a ByteLevel step
    SentencePiece (gemma3, llama2, t5)   ▁né      <0xC3>         a Metaspace or Replace step
    any other                            as is    none

Special tokens are matched by name, then by their use: the token that ends a document in one
tokenizer is the one that ends it in the other.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain_cli.data.tokenizers.tokenizer import Tokenizer, byte_characters

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""Byte of a character outside the vocabulary, in SentencePiece's spelling."""

Meaning = tuple[str, bytes]
"""A kind (text, byte, name) and the bytes of the text or name."""


@dataclass(frozen=True)
class SharedTokens:
    """Ids of a new tokenizer's tokens that an old tokenizer has, and the counts of the rest."""

    new: np.ndarray
    """Ids in the new tokenizer, ascending. (K,) int64."""
    old: np.ndarray
    """Ids of the same tokens in the old tokenizer. (K,) int64."""
    all_old: np.ndarray
    """Ids of all tokens of the old tokenizer, ascending. (N,) int64."""
    added: int
    """Number of tokens that only the new tokenizer has."""
    texts: int
    """Number of shared tokens that are not special."""

    @property
    def dropped(self) -> int:
        """Number of tokens that only the old tokenizer has."""
        return len(self.all_old) - len(np.unique(self.old))


def shared_tokens(old: Tokenizer, new: Tokenizer, *, old_rows: int) -> SharedTokens:
    """Match the tokens of two tokenizers. Ids of the old one from `old_rows` on don't count: the
    model has no row for them."""
    known: dict[Meaning, int] = {}
    theirs = {id: meanings for id, meanings in _meanings(old) if id < old_rows}
    for id, meanings in sorted(theirs.items()):
        known.setdefault(meanings[0], id)
        if meanings[-1][0] == "name":
            known.setdefault(meanings[-1], id)
    found: dict[int, int] = {}
    ours = dict(_meanings(new))
    for id, meanings in ours.items():
        match = next((known[meaning] for meaning in meanings if meaning in known), None)
        if match is not None:
            found[id] = match
    texts = sum(ours[id][0][0] != "name" for id in found)
    for one, other in ((new.bos, old.bos), (new.eos, old.eos), (new.pad, old.pad)):
        if one is not None and other is not None and other < old_rows:
            found.setdefault(one, other)
    ids = sorted(found)
    return SharedTokens(
        new=np.array(ids, np.int64),
        old=np.array([found[id] for id in ids], np.int64),
        all_old=np.array(sorted(theirs), np.int64),
        added=len(ours) - len(found),
        texts=texts,
    )


def _meanings(tokenizer: Tokenizer) -> Iterator[tuple[int, list[Meaning]]]:
    """Yield each id with its meanings, the most exact first. An added token's last meaning is its
    name; a special token has no other."""
    spec = json.loads(tokenizer.json)
    steps = list(_steps([spec[name] for name in ("normalizer", "pre_tokenizer", "decoder")]))
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
    spaces = {step["replacement"] for step in steps if step["type"] == "Metaspace"}
    spaces |= {
        step["content"]
        for step in steps
        if step["type"] == "Replace" and step["pattern"] == {"String": " "}
    }
    byte_of = {character: byte for byte, character in byte_characters().items()}
    characters = set(byte_of)
    has_byte_tokens = bool(spec["model"].get("byte_fallback"))
    is_special = {token["content"]: token["special"] for token in spec["added_tokens"]}
    learned = tokenizer.backend.get_vocab(with_added_tokens=False)

    def text_of(token: str) -> bytes:
        if is_byte_level and characters.issuperset(token):
            return bytes(map(byte_of.__getitem__, token))
        for space in spaces:
            token = token.replace(space, " ")
        return token.encode()

    for token, id in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        name = ("name", token.encode())
        if is_special.get(token, False):
            yield id, [name]
        elif token not in learned:
            yield id, [("text", token.encode()), name]
        elif has_byte_tokens and (match := BYTE_TOKEN.fullmatch(token)):
            byte = bytes.fromhex(match[1])
            yield id, [("byte", byte), ("text", byte)]
        else:
            text = text_of(token)
            yield id, [("text", text), *([("byte", text)] if len(text) == 1 else [])]


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield every step of a tokenizer's parts, those of sequences too."""
    if isinstance(part, list):
        for each in part:
            yield from _steps(each)
    elif isinstance(part, dict):
        if "type" in part:
            yield part
        for each in part.values():
            yield from _steps(each)
