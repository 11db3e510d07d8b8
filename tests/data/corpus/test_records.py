"""Records: JSON lines and rows of Parquet files as documents."""

import hashlib
import io
import json
import os
import re
import sys
import tracemalloc

import pyarrow
import pytest
from pyarrow import parquet

from pretrain_cli.data.corpus.readers import FileReader, ReadOptions
from pretrain_cli.data.corpus.source_files import find_corpus
from tests.data.corpus import test_readers
from tests.data.corpus.test_readers import (
    RANDOM,
    damaged,
    read,
    read_unfinished,
    refusal,
    send,
    texts,
)

packed = test_readers.packed  # a fixture

ROWS = ["one", None, "zwei\r\nü", "", "three 👋", "one"]


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson"])
def test_each_json_line_is_a_document(packed, ending):
    first = b'\xef\xbb\xbf{"text": "one\\ntwo", "id": 1}\n\n'  # a byte order mark, a blank line
    path = packed(f"a{ending}", first + b'{"text": "\\ud83d\\ude00"}\r\n{"text": ""}')
    assert texts(path) == ["one\ntwo", "😀"]


def test_text_key_selects_the_key_of_a_json_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 5, "content": "this"}\n')
    assert texts(path, text_key="content") == ["this"]


def test_other_values_of_a_json_line_are_ignored(tmp_path):
    line = json.dumps({"text": "this", "deep": [{"a": [None, 1e300]}], "other": "é"})
    path = tmp_path / "a.jsonl"
    path.write_text(line[:-1] + f', "huge": {"9" * 5000}, "nan": NaN}}\n')
    assert texts(path) == ["this"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "cut', "not a JSON line (Invalid control character at column 14); mend"),
        (b"plain words", "not a JSON line"),
        (b'{"text": "a"} {"text": "b"}', "not a JSON line (Extra data at column 15)"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"txt": "other"}', "no text under 'text' (it has txt); name the key with --text-key"),
        (b'{"text": 5}', "what is under 'text' is not text; name another key with --text-key"),
        (b'{"text": null}', "what is under 'text' is not text"),
        (b'["text"]', "no text under 'text' (it has a list)"),
    ],
)
def test_the_error_for_a_bad_json_line_has_its_line_number(tmp_path, line, what):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert what in message


@pytest.mark.parametrize(
    ("line", "replaced"),
    [(b'{"text": "caf\xe9"}', "caf\ufffd"), (b'{"text": "half \\ud83d."}', "half \ufffd+.")],
)
def test_the_errors_option_applies_to_json_lines_with_invalid_utf8(packed, line, replaced):
    """JSON can escape half of a surrogate pair, which UTF-8 can't encode."""
    path = packed("a.jsonl", b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    assert read(path) == (["good", "good"], {"not UTF-8, left out": 1})
    (_, text, _), remarks = read(path, errors="replace")
    assert re.fullmatch(replaced, text)
    assert remarks == {"not UTF-8, replaced": 1}
    assert refusal(path, errors="fail").startswith(f"{path}:2: not UTF-8")


def table(values, kind, **others):
    columns = {"text": pyarrow.array(values, kind)} | others
    buffer = io.BytesIO()
    parquet.write_table(
        pyarrow.table(columns), buffer, row_group_size=100, write_page_checksum=True
    )
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ],
    ids=str,
)
def test_each_parquet_row_with_text_is_a_document(packed, kind):
    path = packed("a.parquet", table(ROWS, kind, id=list(range(6))))
    assert texts(path) == ["one", "zwei\r\nü", "three 👋", "one"]


def test_parquet_can_be_read_from_a_stream(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    send(tmp_path / "a.parquet", table(ROWS, pyarrow.string()))
    assert len(texts(tmp_path / "a.parquet")) == 4


def test_a_row_group_is_not_held_in_memory_whole(tmp_path):
    """Many Parquet files have a single row group."""
    path = tmp_path / "a.parquet"
    rows = pyarrow.table(
        {"text": [hashlib.shake_128(b"%d" % n).hexdigest(2000) for n in range(5000)]}
    )
    parquet.write_table(rows, path, use_dictionary=False)
    (file,) = find_corpus([str(path)]).files
    documents = FileReader(file, ReadOptions()).documents()
    next(documents)  # imports and caches are not measured
    tracemalloc.start()
    try:
        assert sum(1 for _ in FileReader(file, ReadOptions()).documents()) == 5000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 2
    finally:
        tracemalloc.stop()


def test_text_key_selects_the_column_of_a_parquet_file(tmp_path):
    (tmp_path / "a.parquet").write_bytes(table([1], pyarrow.int8(), **{"a.b": ["this"]}))
    assert texts(tmp_path / "a.parquet", text_key="a.b") == ["this"]


def test_a_missing_or_non_text_column_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(table([1], pyarrow.int8(), url=["x"], words=[["x"]]))
    assert refusal(path, text_key="body") == (
        f"{path}: no column 'body' (it has text, url, words); name the column with --text-key"
    )
    assert (
        refusal(path) == f"{path}: column 'text' holds int8, not text; name another with --text-key"
    )
    assert "column 'words' holds list<" in refusal(path, text_key="words")


def test_the_errors_option_applies_to_parquet_cells_with_invalid_utf8(tmp_path):
    broken = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "a.parquet"
    path.write_bytes(table(broken, pyarrow.string()))
    assert read(path) == (["good"], {"not UTF-8, left out": 1})
    assert read(path, errors="replace")[0] == ["good", "caf\ufffd"]
    assert refusal(path, errors="fail").startswith(f"{path}:2: not UTF-8")


def test_without_pyarrow_the_error_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(table(ROWS, pyarrow.string()))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(tmp_path / "a.parquet") == (
        f"{tmp_path / 'a.parquet'}: reading Parquet takes pyarrow; pip install pyarrow"
    )


@pytest.mark.parametrize("how", ["cut", "other"])
def test_the_errors_option_applies_to_a_damaged_parquet_file(tmp_path, how):
    """The metadata of a Parquet file is at its end, so a cut file has no readable rows."""
    path = tmp_path / "a.parquet"
    path.write_bytes(damaged(how, table(["one", "two"], pyarrow.string())))
    assert read_unfinished(path) == ([], {"damaged; documents that end before that are kept": 1})
    assert refusal(path, errors="fail").startswith(f"{path}: damaged (")


def test_rows_before_the_damage_in_a_parquet_file_are_kept(tmp_path):
    values = [RANDOM[start : start + 500] for start in range(0, 500_000, 500)]
    path = tmp_path / "a.parquet"
    path.write_bytes(damaged("altered", table(values, pyarrow.string())))
    found, remarks = read_unfinished(path)
    assert 0 < len(found) < len(values)
    assert found == values[: len(found)]
    assert remarks == {"damaged; documents that end before that are kept": 1}
    assert refusal(path, errors="fail").startswith(f"{path}: damaged (")
