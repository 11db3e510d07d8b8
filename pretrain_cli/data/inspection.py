"""Facts about a tokenized dataset: document lengths and boundaries."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_cli.data.dataset import Split
from pretrain_cli.data.shards import Manifest
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer, read_tokenizer

READ_AT_ONCE = 2**26
"""Number of tokens whose documents are examined together."""


@dataclass(frozen=True)
class Lengths:
    """Document lengths in tokens, marks included."""

    by_power: dict[int, int]
    """Number of documents by length: key n counts those with n to 2n − 1 tokens."""
    shortest: int
    longest: int


def document_lengths(split: Split) -> Lengths:
    """Return statistics of a split's document lengths. Memory does not grow with their number."""
    total = len(split.tokens)
    counts: Counter[int] = Counter()
    shortest, longest, open_since = total, 0, 0
    for first in range(0, max(total, 1), READ_AT_ONCE):
        starts = split.documents.between(first, min(first + READ_AT_ONCE, total))
        borders = np.concatenate(([open_since], starts))
        if first + READ_AT_ONCE >= total:
            borders = np.append(borders, total)
        lengths = np.diff(borders)
        lengths = lengths[lengths > 0]  # drops the 0 before the first document
        open_since = int(borders[-1])
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
