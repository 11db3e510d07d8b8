"""Write encoded blocks to the files of a dataset.

Duplicates are dropped, tokens go to the shards of their split, every file of the corpus gets a line
in files.jsonl, and the position in the corpus is kept.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from pretrain_cli.data.corpus.source_files import Corpus
from pretrain_cli.data.shards import FILES, Manifest, SplitName
from pretrain_cli.data.tokenizing.blocks import Encoded, FileEnd, RecordsEnd, Sums
from pretrain_cli.data.tokenizing.duplicates import DuplicateIndex
from pretrain_cli.data.tokenizing.progress import (
    Cursor,
    FileTally,
    ResumePoint,
    SavedProgress,
    WriteState,
)
from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.data.tokenizing.shard_writer import ShardWriter, close_anyhow
from pretrain_cli.files import flush

TO_JSON = json.JSONEncoder(ensure_ascii=False).encode


class BlockWriter:
    """Appends encoded blocks to the files of a dataset in one folder."""

    def __init__(
        self,
        request: TokenizeRequest,
        corpus: Corpus,
        folder: Path,
        vocab_size: int,
        existing: Manifest | None,
        saved: SavedProgress | None,
    ) -> None:
        """Continue from saved progress, or else begin with what the existing dataset holds."""
        self.request, self.corpus = request, corpus
        self.compared = 0
        """Samples for which two encoders gave the same ids."""
        self.place, self.of_file = Cursor(), FileTally()
        self.shards = ShardWriter(folder, vocab_size, request.shard_tokens)
        path = folder / FILES
        if saved is not None:
            self.place, self.of_file = saved.here.place, _copied(saved.here.of_file)
            self.shards.resume(saved.here.written, saved.shards)
            os.truncate(path, saved.here.written.files_bytes)
        elif existing is not None:
            self.shards.begin_after(existing, request.out)
            shutil.copyfile(request.out / FILES, path)
        self.files = path.open("ab")
        self.file_began = saved.file_began if saved else self.reached()
        self.seen = DuplicateIndex(folder, self.place.ordinal, request)
        self.is_dropped, self.resumes_inside = False, self.place.block > 0

    def append(self, encoded: Encoded) -> None:
        """Append the tokens of a task, except those of duplicates, and lines to files.jsonl."""
        blocks = encoded.blocks
        self.compared += encoded.compared
        kept = self._kept(blocks)
        tokens, borders = encoded.tokens, np.cumsum([0, *blocks["tokens"]])
        if not kept.all():
            tokens = tokens[np.repeat(kept, blocks["tokens"])]
            borders = np.cumsum([0, *(blocks["tokens"] * kept)])
        first, sums = 0, Sums(blocks, kept)
        for last, end in encoded.files:
            self._count(sums, first, last)
            self._end_file(end)
            first = last
        # a file's beginning is a point to return to, for which the tokens before it are written
        self._write(tokens, blocks[:first], kept[:first], borders)
        if encoded.files:
            self.file_began = self.reached()
        self._count(sums, first, len(blocks))
        self._count_records(encoded.unfinished)
        self._write(tokens, blocks[first:], kept[first:], borders[first:])

    def _kept(self, blocks: np.ndarray) -> np.ndarray:
        """Return the blocks that belong to no duplicate."""
        kept = np.ones(len(blocks), bool)
        if not self.request.dedup:
            return kept
        ordinal = self.place.ordinal
        for number, block in enumerate(blocks):
            if block["begins"] or self.resumes_inside:
                is_new = not self.seen.has(bytes(block["digest"]), ordinal)
                self.is_dropped = block["begins"] and not is_new
                self.resumes_inside = False
            kept[number] = not self.is_dropped
            ordinal += bool(block["ends"])
        return kept

    def _count(self, sums: Sums, first: int, last: int) -> None:
        """Count the blocks from `first` up to `last`, all of one file, and move the position behind
        them."""
        if first == last:
            return
        file, place = self.of_file, self.place
        file.documents += sums.documents[last] - sums.documents[first]
        file.bytes += sums.bytes[last] - sums.bytes[first]
        file.tokens += sums.tokens[last] - sums.tokens[first]
        complete = sums.ends[last] - sums.ends[first]
        unfinished = last - max(first, sums.after_end[last])
        self.place = place._replace(
            document=place.document + complete,
            # a duplicate of which a part was read is read again from its beginning
            block=0 if self.is_dropped else unfinished + (0 if complete else place.block),
            ordinal=place.ordinal + complete,
            duplicates=place.duplicates + sums.duplicates[last] - sums.duplicates[first],
            inexact_cuts=place.inexact_cuts + sums.inexact[last] - sums.inexact[first],
        )

    def _count_records(self, end: RecordsEnd) -> None:
        """Move the position behind records of a file that goes on."""
        self.place = self.place._replace(records=self.place.records + end.records)
        self.of_file.remarks = _added(self.of_file.remarks, end.remarks)

    def _write(
        self, tokens: np.ndarray, blocks: np.ndarray, kept: np.ndarray, borders: np.ndarray
    ) -> None:
        """Append the tokens of blocks to their splits' shards; `borders` are their places among
        `tokens`."""
        if not len(blocks):
            return
        held_out = blocks["held_out"]
        changes = np.flatnonzero(held_out[1:] != held_out[:-1]) + 1
        for first, last in pairwise([0, *changes.tolist(), len(blocks)]):
            split: SplitName = "val" if held_out[first] else "train"
            here = slice(first, last)
            starts = borders[here][blocks["begins"][here] & kept[here]] - borders[first]
            self.shards.add(split, tokens[borders[first] : borders[last]], starts)
            self.shards.splits[split].bytes += int(blocks["bytes"][here][kept[here]].sum())

    def _end_file(self, end: FileEnd) -> None:
        """Append a line to files.jsonl."""
        file = self.corpus.files[self.place.file]
        row = {
            "name": file.name,
            "source": file.source,
            "size": file.size,
            "modified": file.modified,
            "sha256": end.sha256,
            **vars(self.of_file),
            "remarks": _added(self.of_file.remarks, end.remarks),
        }
        self.files.write(TO_JSON(row).encode() + b"\n")
        self.place = self.place._replace(file=self.place.file + 1, document=0, block=0, records=0)
        self.of_file = FileTally()

    def reached(self) -> ResumePoint:
        """Return the position, and the extent of the files there."""
        written = WriteState(
            dtype=self.shards.name,
            closed=len(self.shards.closed),
            open={split: shard.extent for split, shard in self.shards.open.items()},
            splits={name: replace(tally) for name, tally in self.shards.splits.items()},
            files_bytes=self.files.tell(),
        )
        return ResumePoint(self.place, _copied(self.of_file), written)

    def flush(self) -> None:
        """Bring all to the disk."""
        self.seen.commit()
        self.shards.flush()
        flush(self.files)

    def close(self) -> None:
        """Close the files as they are."""
        self.seen.close()
        close_anyhow(self.files)
        self.shards.abandon()


def _copied(tally: FileTally) -> FileTally:
    return replace(tally, remarks=dict(tally.remarks))


def _added(some: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return dict(Counter(some) + Counter(more))
