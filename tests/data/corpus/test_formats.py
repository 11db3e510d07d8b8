"""Formats: a file is read as what its first bytes say, or left out by name."""

import gzip
import io
import json
import sqlite3
import tarfile
import zipfile
from typing import get_args

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from pretrain_cli.commands.tokenize import tokenize
from pretrain_cli.data.corpus import formats
from pretrain_cli.data.corpus.documents import Kind
from pretrain_cli.data.corpus.formats import FORMATS, Format, is_read
from pretrain_cli.data.corpus.records import in_parts
from tests.data.corpus.test_readers import COMPRESS, read, refusal, texts


def in_memory(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "words")


def tarred(file):
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())


def database():
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE a (text)")
        return connection.serialize()


def image(kind):
    return in_memory(lambda file: Image.new("RGB", (2, 2)).save(file, kind))


SAMPLES = {
    "UTF-16 text": "words".encode("utf-16"),
    "UTF-32 text": "words".encode("utf-32"),
    "PDF document": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj",
    "RTF document": b"{\\rtf1\\ansi words}",
    "zip archive or document": in_memory(zipped),
    "tar archive": in_memory(tarred),
    "SQLite database": database(),
    "NumPy array": in_memory(lambda file: np.save(file, np.arange(9))),
    "PNG image": image("PNG"),
    "JPEG image": image("JPEG"),
    "GIF image": image("GIF"),
    "TIFF image": image("TIFF"),
    "WebP image": image("WEBP"),
    "safetensors file": b"\x40\0\0\0\0\0\0\0{\"a\":{}}",
    "program": b"\x7fELF\2\1\1\0",
}  # fmt: skip


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("ending", [".txt", "", ".jsonl", ".csv", ".bin.gz"])
def test_what_is_not_text_is_left_out_by_name(tmp_path, kind, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(SAMPLES[kind]) if ending.endswith("gz") else SAMPLES[kind])
    assert read(path) == ([], {f"{kind}, left out": 1})
    assert read(path, errors="replace") == ([], {f"{kind}, left out": 1})
    assert read(path, kind="text") == ([], {f"{kind}, left out": 1})
    assert refusal(path, errors="fail").startswith(f"{path}: {kind}, which is not read; convert")


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl", "a.json"])
def test_a_compressed_file_is_decompressed_whatever_its_name(tmp_path, ending, name):
    data = b'{"text": "one"}\n{"text": "two"}\n'
    path = tmp_path / name
    path.write_bytes(COMPRESS[ending](data))
    assert texts(path) == ["one", "two"]
    path.write_bytes(COMPRESS[ending](COMPRESS[ending](b"words")))
    assert texts(path, kind="text") == ["words"]


def test_a_table_is_read_as_such_whatever_its_name(tmp_path):
    rows = pyarrow.table({"text": ["one", "two"]})
    parquet.write_table(rows, tmp_path / "a.txt")
    with pyarrow.ipc.new_stream(tmp_path / "b.json", rows.schema) as writer:
        writer.write_table(rows)
    for name in ("a.txt", "b.json"):
        assert texts(tmp_path / name) == ["one", "two"]


def test_text_that_resembles_another_format_stays_text(tmp_path):
    for text in (
        "PAR1S is a city", "BZh, he said", "[1] a footnote", '{"name": "x"}\n{}', "{\n}", "GIF",
        "text,id\n1,2\n", '{"text": 5}\n', "ORC", "WARC/1.0 is a format", "7z is an archive",
        "ID3 tags", "MZ", 'a: {"text": "b"}',
    ):  # fmt: skip
        (tmp_path / "a.txt").write_text(text)
        assert texts(tmp_path / "a.txt") == [text]


def test_json_with_the_text_key_is_recognized_by_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(
        json.dumps({"body": {"en": "one"}}) + "\n" + json.dumps({"body": {"en": "two"}})
    )
    assert texts(path, text_key="body.en") == ["one", "two"]
    assert texts(path) == [path.read_text()]
    assert texts(path, text_key="body.en", kind="text") == [path.read_text()]
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert texts(path) == ["one", "two"]


def test_a_format_is_added_by_one_row(tmp_path, monkeypatch):
    def stanzas(source):
        yield from in_parts(enumerate(source.stream.read().split(b"\n\n")[1:], start=1))

    row = Format(suffixes=(".poem",), begins=(b"POEM",), records=stanzas)
    monkeypatch.setitem(FORMATS, "poem", row)
    for name in ("a.poem", "b.txt"):
        (tmp_path / name).write_text("POEM\n\none\n\ntwo")
        assert texts(tmp_path / name) == ["one", "two"]
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"words\n\none"))
    assert texts(tmp_path / "c.txt.gz", kind="poem") == ["one"]

    archive = Format(suffixes=(".rev",), begins=(b"REV",), decompress=lambda raw, path: io.BytesIO(
        raw.read()[:2:-1]))  # fmt: skip
    monkeypatch.setitem(FORMATS, "rev", archive)
    for name in ("a.jsonl.rev", "b.jsonl"):
        (tmp_path / name).write_bytes(b"REV" + b'{"text": "one"}'[::-1])
        assert texts(tmp_path / name) == ["one"]


def test_every_list_of_formats_has_the_same_names():
    names = [name for name in FORMATS if is_read(name)]
    option = get_args(tokenize.__annotations__["input"])[0]
    assert set(get_args(Kind)) == set(get_args(option)) == {"auto", *names}
    assert formats.TEXT in names
