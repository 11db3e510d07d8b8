"""Checks of a dataset for what usually goes wrong, on a sample that a fixed seed draws.

from             | what                                      | read
dataset.json     | text that was not UTF-8                   | all
files.jsonl      | one file with most of the tokens          | all, or parts at even distances
the index        | one document with most of the tokens      | as in inspection.py
the tokens       | end marks, copies of other documents      | a sample of documents
their text       | end marks as text, repeated lines         | a smaller sample, the first tokens
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrain_cli.data.dataset import Split, open_split
from pretrain_cli.data.inspection import iter_lengths
from pretrain_cli.data.shards import FILES, Manifest, rows_of
from pretrain_cli.data.tokenizers.tokenizer import KNOWN_ENDS, Tokenizer, read_tokenizer
from pretrain_cli.units import size

SEED = 0
COMPARED = 20_000
"""Documents that are compared with each other. They are drawn by their length and their ends, so
that of a drawn document every copy is drawn too: the share of copies is that of the dataset."""
COMPARED_OF_ALL = 2**21
"""The same when everything is read: their checksums take about 300 MB."""
DECODED = 1_000
"""Documents whose text is examined; with all documents, ten times as many."""
FEWEST_COMPARED = 1_000
CANDIDATES = 16
"""Documents drawn by length for one that is compared. Fewer lengths would be too few."""
ENDS_DRAWN, ENDS_COMPARED = 32, 4_096
"""Tokens at each end of a document that are compared. Copies agree in them and in their length."""
TOKENS_DECODED = 1_024
FILES_READ = 2**26
"""Bytes of files.jsonl that are read."""
FILE_PARTS = 64
HUGE = 10**8
"""Bytes of a document that is reported as huge."""
LINE = 40
"""Shortest line that counts as boilerplate, in characters."""
LINES_TOLD = 10
OFTEN = 0.2
"""Share of documents from which on a repeated line, or an end mark as text, is a warning."""


@dataclass(frozen=True)
class Checks:
    """Findings. Shares are of the documents or tokens that were read."""

    seed: int
    documents: int
    """Training documents of the dataset."""
    lengths_read: int
    compared: int
    decoded: int
    files_read: int
    copies: float | None
    """Share of documents that are copies of an earlier one; None if too few have a length that was
    drawn."""
    not_utf8: float
    """Share of documents that were left out or changed when they were tokenized."""
    largest_file: str
    largest_file_share: float
    """Share of all tokens in the file with most of them."""
    longest_document: int
    """Tokens of the longest document."""
    without_end: float
    """Share of documents that don't end with the end-of-document token."""
    typed_ends: dict[str, float]
    """Share of documents that hold the text of an end mark, by mark."""
    repeated_lines: dict[str, float]
    """Lines in many documents, with the share of documents that have each."""
    warnings: list[str]


@dataclass
class _Sample:
    """Counts of the documents that were read."""

    lengths: int = 0
    longest: int = 0
    compared: int = 0
    seen: Counter[bytes] = field(default_factory=Counter[bytes])
    decoded: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """First token and length of the documents to decode."""

    @property
    def copies(self) -> float | None:
        if self.compared < min(self.lengths, FEWEST_COMPARED):
            return None
        return (self.compared - len(self.seen)) / max(self.compared, 1)


def check_dataset(folder: Path, manifest: Manifest, *, read_all: bool = False) -> Checks:
    """Check the training documents of a dataset whose files were found. Time and memory are
    bounded unless `read_all`."""
    split = open_split(folder, manifest, "train")
    tokenizer = read_tokenizer(folder / "tokenizer.json", name=manifest.tokenizer)
    end, sample = manifest.end_of_document, _read(split, read_all)
    typed, lines = _texts(split, tokenizer, sample.decoded)
    files, largest, tokens = 0, "", 0
    for row in _file_rows(folder, read_all):
        files += 1
        if row["tokens"] > tokens:
            largest, tokens = row["name"], row["tokens"]
    wrong = {k: n for k, n in manifest.remarks.items() if k.startswith("not UTF-8")}
    missing = sum(n for name, n in wrong.items() if name.endswith("left out"))
    total, decoded = manifest.total, sample.decoded
    unended = sum(int(split.tokens.read(start + n - 1, 1)[0]) != end for start, n in decoded)
    found = Checks(
        seed=SEED,
        documents=len(split.documents),
        lengths_read=sample.lengths,
        compared=sample.compared,
        decoded=len(sample.decoded),
        files_read=files,
        copies=sample.copies,
        not_utf8=sum(wrong.values()) / max(total.documents + missing, 1),
        largest_file=largest,
        largest_file_share=tokens / max(total.tokens, 1),
        longest_document=sample.longest,
        without_end=unended / max(len(decoded), 1),
        typed_ends=typed,
        repeated_lines=lines,
        warnings=[],
    )
    found.warnings.extend(_warnings(found, total.bytes / max(total.tokens, 1)))
    return found


def _warnings(found: Checks, bytes_per_token: float) -> Iterator[str]:
    """Yield a line for each finding that is usually a mistake: what it is, and what to do."""
    if found.files_read > 1 and found.largest_file_share >= 0.5:
        yield (
            f"{found.largest_file_share:.0%} of the tokens come from one file, "
            f"{found.largest_file}: make it a dataset of its own, and mix with --data a:0.7 b:0.3"
        )
    longest = found.longest_document * bytes_per_token
    if longest >= HUGE:
        yield (
            f"A document has {found.longest_document:,} tokens, about {size(longest)}: documents "
            "may be joined; split them with --document-separator, or name their format with --input"
        )
    if found.without_end:
        yield (
            f"{found.without_end:.1%} of the documents don't end with the end-of-document token: "
            "the model can't learn where a document ends; tokenize again"
        )
    for mark, share in found.typed_ends.items():
        if share >= OFTEN:
            yield (
                f"{share:.0%} of the documents hold {mark} as text: if it separates documents, "
                f"tokenize with --document-separator '{mark}' or --allow-special"
            )
    if found.copies is not None and found.copies >= 0.01:
        yield f"{found.copies:.1%} of the documents are copies of another: tokenize with --dedup"
    if found.not_utf8 >= 0.01:
        yield (
            f"{found.not_utf8:.1%} of the documents are not UTF-8: convert them, such as with "
            "iconv; they are left out, or hold replacement characters"
        )
    often = {line: share for line, share in found.repeated_lines.items() if share >= OFTEN}
    for line, share in list(often.items())[:1]:
        yield (
            f"A line repeats in {share:.0%} of the documents, and {len(often) - 1} more in at "
            f"least {OFTEN:.0%}: '{line[:60]}'; boilerplate is learned instead of text, take it out"
        )


def _read(split: Split, read_all: bool) -> _Sample:
    """Read the lengths of documents, and the tokens of the documents drawn to be compared."""
    sample, random, total = _Sample(), np.random.default_rng(SEED), len(split.documents)
    most = COMPARED_OF_ALL if read_all else COMPARED
    by_length = max(-(-total // (CANDIDATES * most)), 1)
    by_ends = max(-(-total // (by_length * most)), 1)
    candidates = 0
    wanted = DECODED * (10 if read_all else 1) / max(total, 1)
    for starts, lengths in iter_lengths(split, read_all=read_all):
        sample.lengths += len(lengths)
        sample.longest = max(sample.longest, int(lengths.max(initial=0)))
        decoded = random.random(len(starts)) < wanted
        sample.decoded += zip(starts[decoded].tolist(), lengths[decoded].tolist(), strict=True)
        hashes = lengths.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)
        drawn = np.flatnonzero(hashes % np.uint64(by_length) == 0)
        drawn = drawn[: 4 * CANDIDATES * most - candidates]  # very many may have one length
        candidates += len(drawn)
        for start, length in zip(starts[drawn].tolist(), lengths[drawn].tolist(), strict=True):
            ends = _digest(split, start, length, ENDS_DRAWN)
            if int.from_bytes(ends, "little") % by_ends == 0:
                sample.seen[_digest(split, start, length, ENDS_COMPARED)] += 1
                sample.compared += 1
    return sample


def _digest(split: Split, start: int, length: int, tokens: int) -> bytes:
    """Return a checksum of a document's length and of so many tokens at each of its ends."""
    tokens = min(tokens, length)
    head, tail = (split.tokens.view(at, tokens) for at in (start, start + length - tokens))
    return hashlib.blake2b(
        b"%d" % length + head.tobytes() + tail.tobytes(), digest_size=16
    ).digest()


def _texts(
    split: Split, tokenizer: Tokenizer, documents: list[tuple[int, int]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the shares of documents that hold an end mark as text, and that hold a line which at
    least 5 % of different documents, and five, hold."""
    rows = [split.tokens.read(start, min(n, TOKENS_DECODED)).tolist() for start, n in documents]
    texts = tokenizer.backend.decode_batch(rows, skip_special_tokens=True)
    marks = Counter(mark for text in texts for mark in KNOWN_ENDS if mark in text)
    different = set(texts)
    lines = Counter(
        line
        for text in different
        for line in {line.strip() for line in text.splitlines()}
        if len(line) >= LINE
    )
    least = max(5, 0.05 * len(different))
    return (
        {mark: count / len(texts) for mark, count in marks.items()},
        {
            text: count / len(different)
            for text, count in lines.most_common(LINES_TOLD)
            if count >= least
        },
    )


def _file_rows(folder: Path, read_all: bool) -> Iterator[dict[str, Any]]:
    """Yield lines of files.jsonl: all, or those in parts at even distances of a larger file."""
    path = folder / FILES
    bytes_there = path.stat().st_size
    if read_all or bytes_there <= FILES_READ:
        yield from rows_of(folder)
        return
    with path.open("rb") as file:
        for first in np.linspace(0, bytes_there, FILE_PARTS, endpoint=False, dtype=int).tolist():
            file.seek(first)
            if first:
                file.readline()  # the rest of a line
            while file.tell() < first + FILES_READ // FILE_PARTS and (line := file.readline()):
                yield json.loads(line)
