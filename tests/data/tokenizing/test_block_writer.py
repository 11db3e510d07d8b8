"""Writing blocks: any division into tasks gives the dataset of a plain count."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.corpus.source_files import Corpus, TextFile
from pretrain_cli.data.tokenizing.block_writer import BlockWriter
from pretrain_cli.data.tokenizing.blocks import BLOCK, Encoded, FileEnd
from pretrain_cli.data.tokenizing.request import TokenizeRequest

DOCUMENTS = st.tuples(st.integers(0, 5), st.lists(st.integers(1, 9), min_size=1, max_size=3))
"""The digest of a document, and the tokens of each of its blocks."""


def facts(digest, lengths):
    last = len(lengths) - 1
    for number, tokens in enumerate(lengths):
        size = 100 + digest if number == last else 0
        held_out = digest % 3 == 0
        yield tokens, size, b"%016d" % digest, number == 0, number == last, True, held_out


def write(folder, files, tasks, *, dedup):
    """Write files of documents, with a task ending before each block whose number is in `tasks`.
    Return the position at each end of a task."""
    corpus = Corpus([TextFile(f"{n}.txt", f"{n}.txt", "corpus") for n in range(len(files))])
    request = TokenizeRequest(paths=(), out=folder / "out", tokenizer="bytes", dedup=dedup)
    writer = BlockWriter(request, corpus, folder, 257, None, None)
    blocks, ends, places, number = [], [], [], 0

    def send():
        rows = np.array(blocks, BLOCK)
        tokens = np.repeat([int(row["digest"].tobytes()) for row in rows], rows["tokens"])
        writer.append(Encoded(tokens.astype("<u2"), rows, list(ends), 0, 0, False))
        blocks.clear()
        ends.clear()
        places.append(writer.place)

    for documents in files:
        for digest, lengths in documents:
            for block in facts(digest, lengths):
                if number in tasks:
                    send()
                blocks.append(block)
                number += 1
        ends.append((len(blocks), FileEnd("sum", {})))
    send()
    writer.flush()
    writer.close()
    return places


@pytest.mark.parametrize("dedup", [False, True])
@given(
    files=st.lists(st.lists(DOCUMENTS, max_size=5), min_size=1, max_size=4),
    tasks=st.sets(st.integers(0, 30)),
)
def test_any_division_into_tasks_writes_the_same_files(tmp_path_factory, files, tasks, dedup):
    folder = tmp_path_factory.mktemp("blocks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)  # fsync takes long
        *places, place = write(folder, files, tasks, dedup=dedup)
    seen, kept, before = set(), [], []
    for number, documents in enumerate(files):
        for nth, (digest, lengths) in enumerate(documents):
            is_kept = not dedup or digest not in seen
            # a duplicate of which a part was read is read again from its beginning
            before += [(number, nth, part if is_kept else 0) for part in range(len(lengths))]
            if is_kept:
                kept.append((number, digest, lengths))
            seen.add(digest)
    assert [place[:3] for place in places] == [
        at for number, at in enumerate(before) if number in tasks
    ]
    count = sum(map(len, files))
    assert (place.file, place.document, place.block) == (len(files), 0, 0)
    assert (place.ordinal, place.duplicates) == (count, count - len(kept))
    for split in ("train", "val"):
        chosen = [(d, sum(n)) for _, d, n in kept if (d % 3 == 0) == (split == "val")]
        path = folder / f"{split}-00000"
        found = np.fromfile(f"{path}.bin", "<u2").tolist() if chosen else []
        assert found == [digest for digest, length in chosen for _ in range(length)]
        if chosen:
            starts = np.cumsum([0, *(length for _, length in chosen)])[:-1]
            assert np.fromfile(f"{path}.idx", "<u8").tolist() == starts.tolist()
    rows = [json.loads(line) for line in (folder / "files.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [f"{n}.txt" for n in range(len(files))]
    for number, row in enumerate(rows):
        own = [(digest, sum(lengths)) for at, digest, lengths in kept if at == number]
        assert row["documents"] == len(own)
        assert row["tokens"] == sum(length for _, length in own)
        assert row["bytes"] == sum(100 + digest for digest, _ in own)
