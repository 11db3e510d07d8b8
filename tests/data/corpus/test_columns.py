"""Columns: rows of Parquet and Arrow as documents, for every type that holds text."""

import hashlib
import io
import os
import sys
import tracemalloc

import pyarrow
import pytest
from pyarrow import feather, ipc, parquet

from pretrain_cli.data.corpus import columns as module
from pretrain_cli.data.corpus.documents import ReadOptions
from pretrain_cli.data.corpus.readers import FileReader
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
FOUND = ["one", "zwei\r\nü", "three 👋", "one"]
ONE_NULL = {"null, left out": 1}


def table(values, kind, **others):
    columns = {"text": pyarrow.array(values, kind)} | others
    buffer = io.BytesIO()
    parquet.write_table(
        pyarrow.table(columns), buffer, row_group_size=100, write_page_checksum=True
    )
    return buffer.getvalue()


def arrow(values, kind, open=ipc.new_file, **options):
    """Return an Arrow IPC file or stream with two batches."""
    column = pyarrow.array(values, kind)
    sink = io.BytesIO()
    options = ipc.IpcWriteOptions(unify_dictionaries=True, **options)
    batches = pyarrow.table({"id": [{"deep": [n]} for n in range(len(column))], "text": column})
    with open(sink, batches.schema, options=options) as writer:
        writer.write_table(batches, max_chunksize=4)
    return sink.getvalue()


STRING = pyarrow.string()
TYPES = [
    STRING,
    pyarrow.large_string(),
    pyarrow.string_view(),
    pyarrow.binary(),
    pyarrow.large_binary(),
    pyarrow.binary_view(),
    pyarrow.dictionary(pyarrow.int8(), STRING),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
]
FORMS = {
    ".parquet": table,
    ".arrow": arrow,
    ".arrows": lambda *data: arrow(*data, open=ipc.new_stream),
    ".feather": lambda *data: arrow(*data, compression="zstd"),
}


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_each_row_with_text_is_a_document(tmp_path, form, kind):
    values = [text and text.encode() for text in ROWS] if "binary" in str(kind) else ROWS
    path = tmp_path / f"a{form}"
    path.write_bytes(FORMS[form](values, kind))
    assert read(path) == (FOUND, ONE_NULL)
    assert refusal(path, errors="fail") == (
        f"{path}:2: null, no text; remove it, or use --errors skip"
    )


@pytest.mark.parametrize("form", FORMS)
def test_tables_are_read_from_streams_and_compressed_files(packed, tmp_path, form):
    data = FORMS[form](ROWS, STRING)
    assert read(packed(f"a{form}", data)) == (FOUND, ONE_NULL)
    pipe = tmp_path / f"pipe{form}"
    os.mkfifo(pipe)
    send(pipe, data)
    assert read(pipe) == (FOUND, ONE_NULL)


@pytest.mark.parametrize("form", FORMS)
def test_a_column_without_any_text_is_counted(tmp_path, form):
    for values, kind in (([None] * 5000, pyarrow.null()), ([None] * 5000, STRING), ([], STRING)):
        path = tmp_path / f"a{form}"
        path.write_bytes(FORMS[form](values, kind))
        assert read(path) == ([], {"null, left out": 5000} if values else {})


def test_a_file_that_feather_writes_is_read(tmp_path):
    feather.write_feather(pyarrow.table({"text": ROWS}), tmp_path / "a.feather")
    assert read(tmp_path / "a.feather") == (FOUND, ONE_NULL)


@pytest.mark.parametrize("form", FORMS)
def test_text_key_names_a_nested_field_unless_a_column_has_the_name(tmp_path, form):
    rows = [{"b": {"c": "deep"}}, None, {"b": None}, {"b": {"c": None}}, {"b": {"c": "two"}}]
    columns = {"a": rows, "a.b": ["literal", "x", "y", None, "z"]}
    path = tmp_path / f"a{form}"
    if form == ".parquet":
        parquet.write_table(pyarrow.table(columns), path)
    else:
        open_writer = ipc.new_stream if form == ".arrows" else ipc.new_file
        with open_writer(path, pyarrow.table(columns).schema) as writer:
            writer.write_table(pyarrow.table(columns))
    assert read(path, text_key="a.b.c") == (["deep", "two"], {"null, left out": 3})
    assert read(path, text_key="a.b") == (["literal", "x", "y", "z"], ONE_NULL)
    assert refusal(path, text_key="a.x") == (
        f"{path}: no column 'a.x' (it has a, a.b); name the column with --text-key"
    )
    assert "column 'a' holds struct<b: struct<c: string>>, not text" in refusal(path, text_key="a")


def test_rows_beyond_the_first_batch_keep_their_order_and_number(tmp_path, monkeypatch):
    values = [f"row {number}" for number in range(2000)]
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)
    for form, make in FORMS.items():
        path = tmp_path / f"a{form}"
        path.write_bytes(make(values, STRING))
        assert texts(path) == values
        path.write_bytes(make([*values, None], STRING))
        assert refusal(path, errors="fail").startswith(f"{path}:2001: null")


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


@pytest.mark.parametrize("form", FORMS)
def test_without_pyarrow_the_error_names_the_package(tmp_path, monkeypatch, form):
    path = tmp_path / f"a{form}"
    path.write_bytes(FORMS[form](ROWS, STRING))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    name = "Parquet" if form == ".parquet" else "Arrow"
    assert refusal(path) == f"{path}: reading {name} takes pyarrow; pip install pyarrow"


@pytest.mark.parametrize("how", ["cut", "other"])
@pytest.mark.parametrize("form", [".parquet", ".arrow", ".arrows"])
def test_the_errors_option_applies_to_a_damaged_table(tmp_path, how, form):
    """The metadata of a Parquet or Arrow file is at its end, so a cut file has no readable rows."""
    path = tmp_path / f"a{form}"
    path.write_bytes(damaged(how, FORMS[form](["one", "two"], STRING)))
    assert read_unfinished(path) == ([], {"damaged; documents that end before that are kept": 1})
    assert refusal(path).startswith(f"{path}: damaged (")


def test_batches_before_the_end_of_a_cut_arrow_stream_are_kept(tmp_path):
    path = tmp_path / "a.arrows"
    path.write_bytes(FORMS[".arrows"](ROWS, STRING)[:-200])
    found, remarks = read_unfinished(path)
    assert found == ["one", "zwei\r\nü"]
    assert remarks == {"damaged; documents that end before that are kept": 1, **ONE_NULL}


def test_rows_before_the_damage_in_a_parquet_file_are_kept(tmp_path):
    values = [RANDOM[start : start + 500] for start in range(0, 500_000, 500)]
    path = tmp_path / "a.parquet"
    path.write_bytes(damaged("altered", table(values, pyarrow.string())))
    found, remarks = read_unfinished(path)
    assert 0 < len(found) < len(values)
    assert found == values[: len(found)]
    assert remarks == {"damaged; documents that end before that are kept": 1}
    assert refusal(path).startswith(f"{path}: damaged (")
