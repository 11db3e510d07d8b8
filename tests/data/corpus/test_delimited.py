"""CSV and TSV: a row's text is a column, however it is quoted."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.corpus import test_readers
from tests.data.corpus.test_readers import read, refusal, texts

packed = test_readers.packed  # a fixture


def written(rows, **how):
    file = io.StringIO()
    csv.writer(file, **how).writerows(rows)
    return file.getvalue().encode()


ROWS = [["id", "text"], ["1", 'a "word",\r\n\tü 😀;|'], ["2", ""], ["3", "two"]]
FOUND = (['a "word",\r\n\tü 😀;|', "two"], {"null, left out": 1})


@pytest.mark.parametrize(("ending", "sign"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_each_row_is_a_document(packed, ending, sign):
    for mark in (b"", b"\xef\xbb\xbf"):
        data = mark + written(ROWS, delimiter=sign)
        assert read(packed(f"a.{ending}", data)) == FOUND
    assert texts(packed(f"a.{ending}", written(ROWS, delimiter=sign)), text_key="id") == list("123")


@given(
    cells=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_any_text_that_is_written_is_read(tmp_path_factory, cells, quoting, end):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    if quoting == csv.QUOTE_MINIMAL and end == "\n":  # csv.writer then leaves \r without quotes
        cells = [cell for cell in cells if "\r" not in cell]
    rows = [["text", "n"], *([cell, "1"] for cell in cells)]
    path.write_bytes(written(rows, quoting=quoting, lineterminator=end))
    assert read(path)[0] == [cell for cell in cells if cell]


def test_a_field_may_be_longer_than_the_csv_modules_own_limit(tmp_path):
    long = "word, " * 100_000
    (tmp_path / "a.csv").write_bytes(written([["text"], [long]]))
    assert texts(tmp_path / "a.csv") == [long]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("id,body\n1,a\n", ": no column 'text' (it has id, body); name the column with --text-key"),
        ("text,text\na,b\n", ": more than one column 'text' (it has text, text); name"),
        ("id,text\n1,a\n\n2,one, two\n", ":4: 3 fields, and the first line names 2; mend"),
        ("id,text\n1\n", ":2: 1 fields, and the first line names 2; mend"),
        ('id,text\n1,"a\nb"\n2,"cut\n\n', ":4: not a row of fields (unexpected end of data)"),
        ('id,text\n1,"a" b\n', ":2: not a row of fields (',' expected after '\"')"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path, content, what):
    path = tmp_path / "a.csv"
    path.write_text(content)
    assert refusal(path).startswith(f"{path}{what}")


def test_the_errors_option_applies_to_rows_with_invalid_utf8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,good\n2,caf\xe9\n3,"two\nlines"\n4,caf\xe9\n5,\n')
    remarks = {"not UTF-8, left out": 2, "null, left out": 1}
    assert read(path) == (["good", "two\nlines"], remarks)
    assert read(path, errors="replace")[0] == ["good", "caf\ufffd", "two\nlines", "caf\ufffd"]
    assert refusal(path, errors="fail").startswith(f"{path}:3: not UTF-8")


def test_a_table_without_rows_has_no_documents(tmp_path):
    for content in ("", "id,text\n", "text"):
        (tmp_path / "a.csv").write_text(content)
        assert texts(tmp_path / "a.csv") == []
