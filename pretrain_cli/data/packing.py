"""Packing: whole documents are placed into samples by best-fit decreasing, using an index built
once.

    DATASET/packing-best-fit-SEQ_LEN.idx
    ├── header      JSON, padded to a page: inputs, totals, and a checksum of the rest
    ├── pieces      for each piece, sample by sample: start, tokens, whether its document continues
    └── samples     for each sample: end of its pieces, number of targets

A sample holds seq_len + 1 tokens. A document that fits stays whole. A longer one is cut into pieces
that overlap by one token, so that each of its tokens but the first is a target once. Every piece
but the last fills a sample by itself; a piece followed by another one in a sample therefore ends
its document.

The index depends only on the dataset and seq_len, not on the seed or the machine. Neighbouring
documents are packed in groups, on all cores; memory use does not grow with the dataset.
"""

import hashlib
import json
import operator
import os
import tempfile
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain_cli.data.batches import Batch
from pretrain_cli.data.dataset import VERIFIED_WHEN_OPENED, Dataset, Split
from pretrain_cli.data.parallel import cores, map_in_order
from pretrain_cli.data.shards import DocumentStarts, TokenStream
from pretrain_cli.errors import DataError
from pretrain_cli.files import flush
from pretrain_cli.targets import IGNORE_INDEX

FORMAT_VERSION = 1
HEADER = 4096
GROUP_TOKENS = 2**23
GROUP_SAMPLES = 256
"""Documents are packed in groups with enough tokens for at least this many samples."""
GROUPS_PER_WORKER = 4
"""Smallest number of groups for which a process is worth its start."""
FIRST_SEARCHED = 2**14
"""Tokens searched first for the last document start before a position."""
PIECE = np.dtype([("start", "<u8"), ("tokens", "<u4"), ("goes_on", "<u4")])
SAMPLE = np.dtype([("end", "<u8"), ("targets", "<u8")])


@dataclass(frozen=True)
class Totals:
    """Token counts of a packed split."""

    tokens: int = 0
    samples: int = 0
    pieces: int = 0
    filled: int = 0
    """Positions in samples that hold a token; the others are padding."""
    cut_documents: int = 0
    """Documents longer than a sample."""
    cut_tokens: int = 0
    """Tokens after the first piece of cut documents; their context lacks the document's
    beginning."""

    def share_filled(self, seq_len: int) -> float:
        return self.filled / (self.samples * (seq_len + 1))

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*map(operator.add, astuple(self), astuple(other)))


class Packed:
    """Samples of whole documents, from a packing index."""

    def __init__(
        self,
        tokens: TokenStream,
        pieces: np.ndarray,
        samples: np.ndarray,
        *,
        seq_len: int,
        fingerprint: str,
        totals: Totals,
    ) -> None:
        self.tokens, self.seq_len, self.fingerprint = tokens, seq_len, fingerprint
        self.pieces, self.samples, self.totals = pieces, samples, totals

    def __len__(self) -> int:
        return len(self.samples)

    def targets(self, numbers: np.ndarray) -> int:
        return int(self.samples["targets"][numbers].sum())

    def fill(self, numbers: np.ndarray, rows: np.ndarray, batch: Batch) -> None:
        for number, row in zip(numbers.tolist(), rows.tolist(), strict=True):
            inputs, targets = batch.inputs[row], batch.targets[row]
            inputs[:], targets[:] = 0, IGNORE_INDEX
            borders = [0]
            for start, size, continues in self._pieces(number):
                piece, at = self.tokens.view(start, size), borders[-1]
                inputs[at : at + size] = piece[: self.seq_len - at]
                skipped = 1 if continues or at == 0 else 0
                targets[at + skipped - 1 : at + size - 1] = piece[skipped:]
                borders.append(at + size)
            if batch.documents is not None:
                places = np.arange(self.seq_len)
                batch.documents[row] = np.searchsorted(borders, places, side="right")

    def stretches(self, number: int) -> list[tuple[int, int]]:
        return [(start, size) for start, size, _ in self._pieces(number)]

    def _pieces(self, number: int) -> list[tuple[int, int, int]]:
        """Return (start, tokens, whether the document continues) of each piece of a sample."""
        first = int(self.samples["end"][number - 1]) if number else 0
        return self.pieces[first : int(self.samples["end"][number])].tolist()


# --- packing -------------------------------------------------------------------------------------


def groups_of_documents(split: Split, group_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of groups of whole documents. Consecutive groups share a border. Only the
    starts near the borders are read."""
    total, begin = len(split.tokens), 0
    while begin < total:
        end, border = begin, None
        while border is None:  # a single document can be longer than a group
            first, end = end, min(end + group_tokens, total)
            border = total if end == total else _last_start(split.documents, first + 1, end + 1)
        yield begin, border
        begin = border


def _last_start(documents: DocumentStarts, first: int, last: int) -> int | None:
    """Return the last position in [first, last) at which a document begins. The starts may have to
    be searched for in the tokens, so they are read from the end on."""
    count = FIRST_SEARCHED
    while last > first:
        begin = max(first, last - count)
        starts = documents.between(begin, last)
        if len(starts):
            return int(starts[-1])
        last, count = begin, count * 2
    return None


def cut(borders: np.ndarray, seq_len: int) -> tuple[np.ndarray, Totals]:
    """Cut documents into pieces, in order. -> (n,) PIECE, and totals of what was cut."""
    lengths = np.diff(borders)
    parts = np.maximum(-(-(lengths - 1) // seq_len), 1)
    documents = np.repeat(np.arange(len(parts)), parts)
    numbers = np.arange(len(documents)) - (np.cumsum(parts) - parts)[documents]
    pieces = np.empty(len(documents), PIECE)
    pieces["start"] = borders[documents] + numbers * seq_len
    pieces["tokens"] = np.minimum(lengths[documents] - numbers * seq_len, seq_len + 1)
    pieces["goes_on"] = numbers > 0
    long = lengths[parts > 1]
    return pieces, Totals(
        tokens=int(lengths.sum()),
        pieces=len(pieces),
        filled=int(pieces["tokens"].sum()),
        cut_documents=len(long),
        cut_tokens=int((long - seq_len - 1).sum()),
    )


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Return the bin of each piece, for sizes in descending order. (n,) -> (n,) int64.

    Each piece goes where it leaves the least room, or into a new bin. A bin that received a piece
    is the best one for the next piece of that size until it has no room left, and bins with equal
    room are interchangeable. All pieces of one size that the bins of one room can take are
    therefore placed at once: about three such operations a size, for any number of pieces.
    """
    bins = np.empty(len(sizes), np.int64)
    rooms: list[int] = []  # room left in open bins, ascending
    with_room: dict[int, list[np.ndarray]] = {}

    def put(found: np.ndarray, room: int) -> None:
        if len(found) and room:
            if room not in with_room:
                insort(rooms, room)
                with_room[room] = []
            with_room[room].append(found)

    placed = opened = 0
    sizes, counts = np.unique(sizes, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            index = bisect_left(rooms, size)
            if index < len(rooms):
                room = rooms.pop(index)
                found = np.concatenate(with_room.pop(room))
            else:
                room = capacity
                found = np.arange(opened, opened - (-count // (capacity // size)))
                opened += len(found)
            each = room // size
            taken = min(count, len(found) * each)
            filled, rest = divmod(taken, each)
            used = filled + (rest > 0)
            bins[placed : placed + taken] = np.repeat(found[:used], each)[:taken]
            put(found[:filled], room - each * size)
            put(found[filled:used], room - rest * size)
            put(found[used:], room)
            placed, count = placed + taken, count - taken
    return bins


def pack(borders: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, Totals]:
    """Pack a group of documents into samples. -> pieces (n,) PIECE, samples (m,) SAMPLE, totals."""
    pieces, totals = cut(borders, seq_len)
    pieces = pieces[np.argsort(-pieces["tokens"].astype(np.int64), kind="stable")]
    bins = best_fit(pieces["tokens"], seq_len + 1)
    order = np.argsort(bins, kind="stable")
    pieces, bins = pieces[order], bins[order]
    counts = np.bincount(bins)
    samples = np.empty(len(counts), SAMPLE)
    samples["end"] = ends = np.cumsum(counts)
    # every token is a target, except the first of a sample and the one that a continued piece
    # repeats from the piece before it
    repeats = pieces["goes_on"].astype(bool)
    repeats[ends - counts] = True
    targets = pieces["tokens"] - repeats.astype(np.int64)
    samples["targets"] = np.add.reduceat(targets, ends - counts)
    return pieces, samples, replace(totals, samples=len(samples))


# --- the index on disk ---------------------------------------------------------------------------


def open_packed(dataset: Dataset, seq_len: int, notify: Callable[[str], None]) -> Packed:
    """Return the packed samples of the training split. Builds the index beside the dataset if it
    does not exist."""
    source = dataset.train, dataset.fingerprint, seq_len
    name = f"packing-best-fit-{seq_len}.idx"
    beside = dataset.path / name
    if not dataset.path.is_dir():  # token files: a file or a pattern
        beside = dataset.path.parent / f"{dataset.name}-{name}"
    # used if the dataset's folder can't be written
    elsewhere = Path(tempfile.gettempdir()) / f"pretrain-{dataset.fingerprint[:16]}-{name}"
    faults = []
    for path in (beside, elsewhere):
        try:
            return read_index(path, *source)
        except FileNotFoundError:
            continue
        except (OSError, DataError) as error:
            faults.append(f"{error}; it is built again")
    for fault in faults:
        notify(fault)
    notify(f"{dataset.path}: packing documents into samples of {seq_len:,} tokens, once")
    try:
        build_index(beside, *source)
        return read_index(beside, *source)
    except OSError as error:
        notify(f"{beside}: can't be written ({error.strerror}); the index is kept in {elsewhere}")
    build_index(elsewhere, *source)
    return read_index(elsewhere, *source)


def build_index(path: Path, split: Split, fingerprint: str, seq_len: int) -> None:
    """Write the index of a split to a temporary file, flush it and rename it. Groups are packed on
    all cores; the index is the same bytes for any number."""

    def packed(group: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, Totals]:
        first, end = group
        starts = split.documents.between(first + 1, end)
        return pack(np.concatenate([[first], starts, [end]]), seq_len)

    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two runs may build it
    totals, digest = Totals(), hashlib.sha256()
    group = max(GROUP_TOKENS, GROUP_SAMPLES * seq_len)
    groups = groups_of_documents(split, group)
    workers = min(cores(), len(split.tokens) // (group * GROUPS_PER_WORKER))
    try:
        with staging.open("wb") as file, tempfile.TemporaryFile(dir=path.parent) as behind:
            file.seek(HEADER)
            for pieces, samples, part in map_in_order(packed, groups, workers):
                samples["end"] += totals.pieces
                totals += part
                digest.update(pieces.tobytes())
                file.write(pieces.tobytes())
                behind.write(samples.tobytes())
            behind.seek(0)
            while block := behind.read(2**20):
                digest.update(block)
                file.write(block)
            header = _made_from(fingerprint, seq_len)
            header |= {"totals": asdict(totals), "sha256": digest.hexdigest()}
            file.seek(0)
            file.write(json.dumps(header).encode().ljust(HEADER))
            flush(file)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def read_index(path: Path, split: Split, fingerprint: str, seq_len: int) -> Packed:
    """Return the samples of an index. Raises DataError if it is damaged or belongs to other
    data."""
    expected = _made_from(fingerprint, seq_len)
    with path.open("rb") as file:
        try:
            header = json.loads(file.read(HEADER))
            made_from = {name: header[name] for name in expected}
            totals, checksum = Totals(**header["totals"]), header["sha256"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: damaged") from None
        if made_from != expected:
            raise DataError(f"{path}: made from another dataset, or by another version")
        size = path.stat().st_size
        samples_at = HEADER + totals.pieces * PIECE.itemsize
        if size != samples_at + totals.samples * SAMPLE.itemsize:
            raise DataError(f"{path}: cut short")
        if size <= VERIFIED_WHEN_OPENED:
            file.seek(HEADER)
            if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
                raise DataError(f"{path}: damaged")
    mapped = np.asarray(np.memmap(path, np.uint8, "r"))  # one map, hence one file descriptor
    return Packed(
        split.tokens,
        mapped[HEADER:samples_at].view(PIECE),
        mapped[samples_at:].view(SAMPLE),
        seq_len=seq_len,
        fingerprint=fingerprint,
        totals=totals,
    )


def _made_from(fingerprint: str, seq_len: int) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "packing": "best-fit",
        "dataset": fingerprint,
        "seq_len": seq_len,
    }
