"""Checks of a dataset: each finding against a corpus made to have it, on all documents or a few."""

import json
import random

import numpy as np
import pytest

from pretrain_cli.data import checks, inspection
from pretrain_cli.data.checks import check_dataset
from pretrain_cli.data.shards import read_manifest
from pretrain_cli.data.tokenizing.tokenize import TokenizeRequest, tokenize


@pytest.fixture
def checked(tmp_path):
    """Function that tokenizes texts as bytes, a document and a file each, and checks them."""

    def check(texts, *, read_all=False, change=None):
        corpus = tmp_path / "corpus"
        corpus.mkdir()
        for number, text in enumerate(texts):
            data = text if isinstance(text, bytes) else text.encode()
            (corpus / f"{number:06d}.txt").write_bytes(data)
        request = TokenizeRequest(
            paths=(str(corpus),), out=tmp_path / "data", tokenizer="bytes", val_fraction=0.0
        )
        tokenize(request, lambda *_: None)
        if change:
            change(tmp_path / "data")
        manifest = read_manifest(tmp_path / "data")
        return check_dataset(tmp_path / "data", manifest, read_all=read_all)

    return check


def words(number, count=30):
    draw = random.Random(number)
    return " ".join(str(draw.randrange(10**6)) for _ in range(count))


def test_a_sound_dataset_has_no_warnings(checked):
    found = checked([words(n) for n in range(40)])
    assert found.warnings == []
    assert (found.documents, found.lengths_read, found.compared, found.decoded) == (40,) * 4
    assert (found.copies, found.not_utf8, found.without_end) == (0, 0, 0)


def test_copies_are_counted(checked):
    found = checked([words(n % 30) for n in range(40)])
    assert found.copies == 10 / 40
    assert any("25.0% of the documents are copies" in line for line in found.warnings)


@pytest.mark.parametrize("candidates", [1, 3, 100])
def test_the_share_of_copies_is_estimated_from_a_sample(checked, monkeypatch, candidates):
    """A third of the documents are copies. A sample drawn at random would hold few of both."""
    monkeypatch.setattr(checks, "COMPARED", 300)
    monkeypatch.setattr(checks, "FEWEST_COMPARED", 100)
    monkeypatch.setattr(checks, "CANDIDATES", candidates)
    texts = [words(n, 1 + n % 211) for n in range(1500)]
    found = checked(texts + texts[:750])
    assert 150 < found.compared < 450
    assert found.copies == pytest.approx(1 / 3, abs=0.1)


def test_the_sample_is_the_same_every_time(checked, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "COMPARED", 20)
    monkeypatch.setattr(checks, "DECODED", 20)
    found = checked([words(n, 1 + n % 50) for n in range(300)])
    assert found == check_dataset(tmp_path / "data", read_manifest(tmp_path / "data"))
    assert 5 < found.decoded < 50
    everything = check_dataset(tmp_path / "data", read_manifest(tmp_path / "data"), read_all=True)
    assert everything.compared == 300


def test_copies_are_unknown_if_no_length_was_drawn(checked, monkeypatch):
    monkeypatch.setattr(checks, "COMPARED", 1)
    monkeypatch.setattr(checks, "CANDIDATES", 1)
    found = checked(["the same length"] * 50)
    assert (found.compared, found.copies) == (0, None)


def test_long_documents_that_differ_in_the_middle_only_are_one(checked, monkeypatch):
    """The stated limit of the comparison: both ends and the length."""
    monkeypatch.setattr(checks, "ENDS_COMPARED", 16)
    same = ["a" * 16 + c + "z" * 16 for c in "xy"]
    other = ["b" * 33, "a" * 17 + "z" * 15 + "y", "y" + "a" * 16 + "z" * 16]
    assert checked(same + other).copies == 1 / 5


def test_one_file_with_most_of_the_tokens_is_named(checked):
    found = checked([words(n) for n in range(5)] + [words(9, 500)])
    assert found.largest_file.endswith("000005.txt")
    assert found.largest_file_share > 0.5
    assert any("of the tokens come from one file" in line for line in found.warnings)


def test_a_huge_document_is_told(checked, monkeypatch):
    monkeypatch.setattr(checks, "HUGE", 3_000)
    found = checked([words(n, 400) for n in range(5)] + [words(9, 500)])
    assert found.longest_document == len(words(9, 500)) + 1
    [said] = found.warnings
    assert "documents may be joined" in said
    assert f"{found.longest_document:,} tokens, about 3.4 kB" in said


def test_documents_without_an_end_mark_are_told(checked):
    def spoil(folder):
        tokens = np.fromfile(folder / "train-00000.bin", "<u2")
        ends = np.flatnonzero(tokens == 256)
        tokens[ends[:10]] = ord(".")
        tokens.tofile(folder / "train-00000.bin")

    found = checked([words(n) for n in range(40)], change=spoil)
    assert found.without_end == 10 / 40
    assert any("don't end with the end-of-document token" in line for line in found.warnings)


def test_an_end_mark_that_is_text_is_told(checked):
    found = checked([words(n) + "<|endoftext|>" + words(n + 1000) for n in range(20)])
    assert found.typed_ends == {"<|endoftext|>": 1.0}
    assert any("--document-separator '<|endoftext|>'" in line for line in found.warnings)


def test_repeated_lines_are_told_once_per_document(checked):
    notice = "Licensed under the terms that everybody knows by heart."
    found = checked([f"{notice if n % 2 else ''}\n{words(n)}\n{words(7)}\n" * 2 for n in range(40)])
    assert found.repeated_lines[notice] == 0.5
    assert found.repeated_lines[words(7)] == 1
    [said] = found.warnings
    assert "A line repeats in 100% of the documents, and 1 more" in said


def test_text_that_is_not_utf8_is_a_share(checked):
    found = checked([words(n) for n in range(9)] + [b"caf\xe9 " * 20])
    assert found.not_utf8 == 0.1
    assert any("10.0% of the documents are not UTF-8" in line for line in found.warnings)


def test_parts_of_a_long_list_of_files_are_read(checked, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "FILES_READ", 4096)
    monkeypatch.setattr(checks, "FILE_PARTS", 4)
    found = checked([words(n, 5) for n in range(300)])
    assert 4 < found.files_read < 60
    whole = check_dataset(tmp_path / "data", read_manifest(tmp_path / "data"), read_all=True)
    assert whole.files_read == 300
    rows = [json.loads(line) for line in (tmp_path / "data/files.jsonl").read_text().splitlines()]
    assert whole.largest_file == max(rows, key=lambda row: row["tokens"])["name"]


def test_lengths_of_very_many_documents_are_sampled(checked, monkeypatch, tmp_path):
    monkeypatch.setattr(inspection, "DOCUMENTS_READ", 100)
    monkeypatch.setattr(inspection, "READ_AT_ONCE", 1000)
    texts = [words(n, 1 + n % 5) for n in range(500)]
    found = checked(texts)
    assert 50 < found.lengths_read < 150
    assert found.without_end == 0  # lengths are those of whole documents
    assert found.longest_document <= max(map(len, texts)) + 1
    folder = tmp_path / "data"
    assert check_dataset(folder, read_manifest(folder), read_all=True).lengths_read == 500
