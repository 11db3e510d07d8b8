"""WARC files of extracted text: each `conversion` record is a document."""

import gzip

import pytest

from tests.data.corpus import test_readers
from tests.data.corpus.test_readers import read, read_unfinished, refusal, texts

packed = test_readers.packed  # a fixture


def record(kind, content, length=None):
    fields = f"WARC-Type: {kind}\r\nWARC-Date: 2026-01-01\r\nContent-Length: "
    length = len(content) if length is None else length
    return f"WARC/1.0\r\n{fields}{length}\r\n\r\n".encode() + content + b"\r\n\r\n"


TEXTS = ["one\n\nWARC/1.0\r\nWARC-Type: x\r\n\r\n", "zwei ü 😀", "three"]
RECORDS = [
    record("warcinfo", b"Software-Info: x"),
    *(record("conversion", t.encode()) for t in TEXTS),
]


def test_each_conversion_record_is_a_document(packed):
    for name in ("a.warc.wet", "a.txt"):  # recognized by content, too
        assert texts(packed(name, b"".join(RECORDS))) == TEXTS


def test_records_that_are_compressed_one_by_one_are_one_file(tmp_path):
    """Common Crawl's files are such."""
    (tmp_path / "a.warc.wet.gz").write_bytes(b"".join(map(gzip.compress, RECORDS)))
    assert texts(tmp_path / "a.warc.wet.gz") == TEXTS


def test_pages_as_they_were_fetched_are_left_out_by_name(packed):
    path = packed("a.warc", RECORDS[0] + record("response", b"HTTP/1.1 200 OK\r\n\r\n<html>"))
    assert read(path) == ([], {"WARC of web pages as they were fetched, left out": 1})
    assert refusal(path, errors="fail").startswith(f"{path}: WARC of web pages as they were")


@pytest.mark.parametrize("cut", [10, 3000])
def test_records_before_the_end_of_a_cut_file_are_kept(tmp_path, cut):
    path = tmp_path / "a.wet"
    path.write_bytes((RECORDS[1] + record("conversion", b"x" * 5000))[:-cut])
    remarks = {"damaged; documents that end before that are kept": 1}
    assert read_unfinished(path) == ([TEXTS[0]], remarks)
    assert refusal(path).startswith(f"{path}: damaged (it ends in record 2)")
    path.write_bytes(RECORDS[1] + RECORDS[2][:30])
    assert read_unfinished(path) == ([TEXTS[0]], remarks)


@pytest.mark.parametrize(
    ("second", "what"),
    [
        (b"plain words\n", "no WARC record begins here"),
        (b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\n", "the record has no Content-Length"),
        (record("conversion", b"two", length=1), "no WARC record begins here"),
    ],
)
def test_a_bad_record_is_refused_with_its_number(tmp_path, second, what):
    path = tmp_path / "a.wet"
    path.write_bytes(RECORDS[1] + second)
    assert refusal(path).startswith(f"{path}:{3 if b'two' in second else 2}: {what}; mend it")


def test_the_errors_option_applies_to_records_with_invalid_utf8(tmp_path):
    path = tmp_path / "a.wet"
    path.write_bytes(record("conversion", b"caf\xe9") + RECORDS[2])
    assert read(path) == ([TEXTS[1]], {"not UTF-8, left out": 1})
    assert read(path, errors="replace")[0] == ["caf\ufffd", TEXTS[1]]
