"""Records come in parts of bounded size, which are the same wherever they are parsed."""

import json
import pickle
from itertools import islice

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather, parquet

from pretrain_cli.data.corpus import records as module
from pretrain_cli.data.corpus.documents import Document, ReadOptions
from pretrain_cli.data.corpus.readers import FileReader
from pretrain_cli.data.corpus.records import gather
from pretrain_cli.data.corpus.source_files import find_corpus

TEXTS = ["one", None, "", "three " * 30, *(f"text {number}" for number in range(40)), "x" * 900]


def write_csv(path):
    rows = "".join(f'"{text or ""}",1\n' for text in TEXTS)
    path.write_text(f"text,id\n{rows}")


def write_wet(path):
    path.write_bytes(
        b"".join(
            b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
            % (len(text), text.encode())
            for text in TEXTS
            if text is not None
        )
    )


WRITERS = {
    "a.jsonl": lambda path: path.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS)),
    "a.json": lambda path: path.write_text(json.dumps([{"text": t} for t in TEXTS])),
    "a.parquet": lambda path: parquet.write_table(pyarrow.table({"text": TEXTS}), path),
    "a.arrow": lambda path: feather.write_feather(
        pyarrow.table({"text": TEXTS}), str(path), compression="uncompressed"
    ),
    "a.csv": write_csv,
    "a.wet": write_wet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_part_begins_anywhere_and_is_the_same_in_another_process(tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "READ_AT_ONCE", 200)
    WRITERS[name](tmp_path / name)
    (file,) = find_corpus([str(tmp_path / name)]).files
    parts = list(FileReader(file, ReadOptions()).contents())
    assert not any(isinstance(part, Document) for part in parts)
    for part in parts:
        records = list(part.texts(lambda where: True))
        assert part.count == len(records) > 0  # no blank lines here
        assert part.size >= sum(len(text or b"") for _, text in records)
        for first in range(part.count):
            rest = pickle.loads(pickle.dumps(part.after(first)))
            assert rest.count == part.count - first
            assert list(rest.texts(lambda where: True)) == records[first:]
    found = [text for part in parts for _, text in part.texts(lambda where: True)]
    wanted = [text and text.encode() for text in TEXTS if name != "a.wet" or text is not None]
    assert [text or None for text in found] == [text or None for text in wanted]


@given(st.lists(st.integers(0, 3 * module.READ_AT_ONCE), max_size=30))
def test_gathered_items_keep_their_order_and_long_ones_are_alone(sizes):
    lists = list(gather(iter(sizes), lambda size: size))
    assert [size for gathered in lists for size in gathered] == sizes
    for gathered in lists:
        assert gathered
        assert len(gathered) == 1 or sum(gathered) <= module.READ_AT_ONCE


def test_items_before_an_exception_come_first():
    def items():
        yield from (1, 2)
        raise ValueError("the end")

    lists = gather(items(), lambda item: 1)
    assert next(lists) == [1, 2]
    with pytest.raises(ValueError, match="the end"):
        next(lists)


def test_gathering_reads_one_item_ahead():
    taken = []
    lists = gather((taken.append(n) or n for n in range(9)), lambda item: module.READ_AT_ONCE)
    for expected, _ in enumerate(islice(lists, 3), start=2):
        assert len(taken) == expected
