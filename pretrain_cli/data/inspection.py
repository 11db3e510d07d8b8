"""Facts about a tokenized dataset: document lengths and boundaries."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_cli.data.dataset import Split
from pretrain_cli.data.shards import Manifest
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer, read_tokenizer

READ_AT_ONCE = 2**26
"""Number of tokens whose documents are examined together."""


DOCUMENTS_READ = 2**25
"""Largest number of documents whose lengths are all read: 256 MB of the index. Of more, stretches
of READ_AT_ONCE tokens at even distances are read."""


@dataclass(frozen=True)
class Lengths:
    """Document lengths in tokens, marks included."""

    by_power: dict[int, int]
    """Number of documents by length: key n counts those with n to 2n − 1 tokens."""
    shortest: int
    longest: int


def iter_lengths(
    split: Split, *, read_all: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (first token, length) of the split's documents, (n,) int64 each, a stretch of tokens at
    a time. Of more than DOCUMENTS_READ documents some stretches are left out, unless `read_all`,
    and with them the documents that reach into the next one."""
    total = len(split.tokens)
    every = 1 if read_all else -(-max(len(split.documents), 1) // DOCUMENTS_READ)
    open_since = 0
    for first in range(0, max(total, 1), READ_AT_ONCE * every):
        borders = split.documents.between(first, min(first + READ_AT_ONCE, total))
        if every == 1:
            borders = np.concatenate(([open_since], borders))
            if first + READ_AT_ONCE >= total:
                borders = np.append(borders, total)
            open_since = int(borders[-1])
        lengths = np.diff(borders)
        some = lengths > 0  # drops the 0 before the first document
        yield borders[:-1][some], lengths[some]


def document_lengths(split: Split, *, read_all: bool = False) -> Lengths:
    """Return statistics of a split's document lengths. Memory does not grow with their number."""
    counts: Counter[int] = Counter()
    shortest, longest = len(split.tokens), 0
    for _, lengths in iter_lengths(split, read_all=read_all):
        if len(lengths):
            powers, numbers = np.unique(np.log2(lengths).astype(int), return_counts=True)
            counts.update(dict(zip(powers.tolist(), numbers.tolist(), strict=True)))
            shortest = min(shortest, int(lengths.min()))
            longest = max(longest, int(lengths.max()))
    return Lengths({2**power: counts[power] for power in sorted(counts)}, shortest, longest)


def marks(folder: Path, manifest: Manifest) -> list[str | None]:
    """Return the names of the tokens that begin and end a document; None for one the tokenizer
    lacks."""
    backend = read_tokenizer(folder / "tokenizer.json", name=manifest.tokenizer).backend
    ids = (manifest.beginning_of_document, manifest.end_of_document)
    return [None if each is None else backend.id_to_token(each) for each in ids]


def documents_in(
    tokens: np.ndarray, starts: np.ndarray, tokenizer: Tokenizer
) -> list[tuple[bool, str]]:
    """Return the text of each document in a row of tokens, and whether the document begins there.

    `starts` are the positions in the row at which documents begin. Marks are shown by name.
    """
    begins = set(starts.tolist())
    parts = np.split(tokens, [place for place in starts.tolist() if 0 < place < len(tokens)])
    out, place = [], 0
    for part in parts:
        text = tokenizer.backend.decode(part.tolist(), skip_special_tokens=False)
        out.append((place in begins, text))
        place += len(part)
    return out
