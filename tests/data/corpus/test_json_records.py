"""JSON: lines, arrays and objects as documents, in bounded memory."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.corpus import json_records as module
from pretrain_cli.data.corpus.documents import ReadOptions
from pretrain_cli.data.corpus.readers import FileReader
from pretrain_cli.data.corpus.source_files import find_corpus
from pretrain_cli.errors import DataError
from tests.data.corpus import test_readers
from tests.data.corpus.test_readers import read, refusal, texts

packed = test_readers.packed  # a fixture


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


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
LINES = st.one_of(
    st.dictionaries(st.sampled_from(["text", "a.b", "a", "ü"]), VALUES).map(json.dumps),
    st.text().map(lambda text: json.dumps({"text": text}, ensure_ascii=False)),
    st.text(st.sampled_from('{}[]":, text\\u0dA8éE+-.\t\x00\x0b\ufeff'), max_size=30),
    st.sampled_from(
        [
            *('{"text": "\\ud800"}', '{"text": "\\ud83d\\ude00\\u0000"}', '{"text": "\\/"}'),
            *('{"text": "a", "text": "b"}', '{"text": "a",}', "{'text': 'a'}", '{"text": 1e999}'),
            *('{"text": "a", "n": 01}', '{"text": "a", "n": Infinity}', '{"text": "a"}\x00'),
            *("[" * 2000, '{"a":' * 3000),
        ]
    ),
)


class Stream:
    """A stream that returns these blocks, then raises."""

    def __init__(self, blocks, failure):
        self.blocks, self.failure = iter(blocks), failure

    def read1(self, size):
        block = next(self.blocks, b"")
        if not block and self.failure:
            raise EOFError
        return block


@given(st.lists(st.text("ab\n", min_size=1, max_size=30)), st.booleans())
def test_a_stream_is_cut_into_whole_lines(blocks, fails):
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "READ_AT_ONCE", 10)
        try:
            for data in module._whole_lines(Stream([b.encode() for b in blocks], fails)):
                found.append(data.decode())
        except EOFError:
            assert fails
    lines = "".join(blocks).splitlines(keepends=True)
    if fails and lines and not lines[-1].endswith("\n"):
        lines.pop()
    assert "".join(found) == "".join(lines)
    for data in found[:-1]:
        assert data.endswith("\n")
    longest = max(map(len, blocks), default=0)
    for data in found:
        several = data.splitlines()
        assert len(several) == 1 or max(map(len, several)) <= longest + 10
        assert len(several) == 1 or len(data) <= 2 * longest + 20


@given(st.lists(LINES.map(lambda line: line.encode(errors="surrogatepass")), max_size=3))
def test_orjson_changes_no_text_and_no_message(lines):
    """Lines that it reads otherwise, or not at all, go to the standard library's reader."""

    def outcome():
        data = b"".join(line + b"\n" for line in lines)
        part = module.Lines(Path("a.jsonl"), "text", 1, data.count(b"\n"), data)
        try:
            return list(part.texts(lambda where: where != ":2"))
        except DataError as error:
            return str(error)

    assert module.orjson is not None
    found = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "orjson", None)
        assert outcome() == found


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "cut', "not a JSON line (Invalid control character at column 14); mend"),
        (b"plain words", "not a JSON line"),
        (b'{"text": "a"} {"text": "b"}', "not a JSON line (Extra data at column 15)"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"txt": "other"}', "no text under 'text' (it has txt); name the key with --text-key"),
        (b'{"text": 5}', "what is under 'text' is not text; name another key with --text-key"),
        (b'{"text": ["a"]}', "what is under 'text' is not text"),
        (b"null", "no text under 'text' (it has a NoneType)"),
        (b'["text"]', "no text under 'text' (it has a list)"),
        (b"{", "not a JSON line (Expecting property name enclosed in double quotes at column"),
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


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_a_null_is_counted_and_left_out_or_refused(packed, ending):
    path = packed(f"a{ending}", b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    assert read(path) == (["a", "b"], {"null, left out": 1})
    assert read(path, errors="replace") == (["a", "b"], {"null, left out": 1})
    assert refusal(path, errors="fail").startswith(f"{path}:2: null, no text; remove it")


def test_text_key_names_a_nested_value_unless_a_key_has_the_name(tmp_path):
    rows = [
        {"a": {"b": "nested", "c.d": "mixed"}},
        {"a": {"b": "nested"}, "a.b": "literal"},
        {"a": {"b": None}},
        {"a": None},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read(path, text_key="a.b") == (["nested", "literal"], {"null, left out": 2})
    message = refusal(path, text_key="a.c.d")
    assert message.startswith(f"{path}:2: no text under 'a.c.d' (it has a, a.b); name the key")
    assert "no text under 'a.b.c'" in refusal(path, text_key="a.b.c")


# --- arrays and objects --------------------------------------------------------------------------

OBJECTS = [{"text": "one\ntwo"}, {"id": [{"a": 1}, "]", 2.5e3], "text": "ü 😀 }\\"}, {"text": ""}]
FOUND = ["one\ntwo", "ü 😀 }\\"]
LAYOUTS = {
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
    "array": json.dumps,
    "indented array": lambda rows: "\n " + json.dumps(rows, indent=2) + "\n",
    "raw array": lambda rows: json.dumps(rows, ensure_ascii=False),
    "indented objects": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    "arrays": lambda rows: "".join(json.dumps([row]) for row in rows) + "[]",
    "objects": lambda rows: "".join(map(json.dumps, rows)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_json_is_read(packed, layout):
    data = LAYOUTS[layout](OBJECTS).encode()
    for mark in (b"", b"\xef\xbb\xbf"):
        for name in ("a.json", "a.jsonl") if "objects" not in layout else ("a.json",):
            assert texts(packed(name, mark + data)) == FOUND
    assert texts(packed("a.json", LAYOUTS[layout]([]).encode())) == []


@given(rows=st.lists(st.text(max_size=9)), block=st.integers(1, 30), indent=st.sampled_from([0, 2]))
def test_values_are_the_same_for_any_size_of_block(tmp_path_factory, rows, block, indent):
    path = tmp_path_factory.getbasetemp() / "values.json"
    path.write_text(json.dumps([{"text": f"{row}.", "n": -1.5e9} for row in rows], indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "READ_AT_ONCE", block)
        assert texts(path) == [f"{row}." for row in rows]


def test_an_array_is_not_held_in_memory_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": f"{number} {'word ' * 2000}"} for number in range(2000)]))
    assert path.stat().st_size > 20e6
    (file,) = find_corpus([str(path)]).files
    tracemalloc.start()
    try:
        assert sum(1 for _ in FileReader(file, ReadOptions()).documents()) == 2000
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'[{"text": "a"},\n{"text": "b"}', ":2: value 2: not JSON (It ends within an array)"),
        (b'[{"text": "a"},\n{"text": "b', ":2: value 2: not JSON (Unterminated string starting)"),
        (b'[{"text": "a"},\n{"text": }]', ":2: value 2: not JSON (Expecting value)"),
        (b'[{"text": "a"}\n{"text": "b"}]', ":1: value 1: not JSON (Expecting ',' or ']')"),
        (b'[{"text": "a"}]\nplain words', ":2: value 2: not JSON (Expecting value)"),
        (b'[{"text": "a"},\n\n"b"]', ":3: value 2: no text under 'text' (it has a str)"),
        (b'[{"text": "a"}, {"txt": "b"}]', ":1: value 2: no text under 'text' (it has txt)"),
        (b'[{"text": 5}]', ":1: value 1: what is under 'text' is not text"),
        (b'[{"body": "a"}]', ":1: value 1: no text under 'text' (it has body); name the key"),
        (b"[" * 100_000, ":1: value 1: not JSON (nested too deep)"),
        (b"plain words", ":1: value 1: not JSON (Expecting value)"),
    ],
)
def test_the_error_for_bad_json_names_line_and_value(tmp_path, content, what):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}{what}")


def test_a_fault_in_the_middle_is_found_without_reading_to_the_end(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    good = b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaa"},\n'
    path.write_bytes(b"[" + good * 9 + b'{"text" "b"},\n' + good * 900)
    monkeypatch.setattr(module, "READ_AT_ONCE", 100)
    read_blocks = []
    real = module._Values._read_more
    monkeypatch.setattr(
        module._Values, "_read_more", lambda self: read_blocks.append(1) or real(self)
    )
    assert refusal(path).startswith(f"{path}:10: value 10: not JSON (Expecting ':' delimiter)")
    assert len(read_blocks) < 9


def test_the_errors_option_applies_to_json_values_with_invalid_utf8(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "good"},\n{"text": "caf\xe9"},\n{"text": "\\ud83d."}]')
    assert read(path) == (["good"], {"not UTF-8, left out": 2})
    assert read(path, errors="replace")[0][:2] == ["good", "caf\ufffd"]
    assert refusal(path, errors="fail").startswith(f"{path}:2: not UTF-8")


def test_a_json_object_without_text_is_left_out_by_name(tmp_path):
    """Source trees hold many such files, such as package.json."""
    path = tmp_path / "package.json"
    path.write_text('{\n "name": "left-pad",\n "version": 1\n}\n')
    assert read(path) == ([], {"JSON without 'text', left out": 1})
    assert texts(path, kind="text") == [path.read_text()]
    assert refusal(path, errors="fail") == (
        f"{path}: JSON without 'text', which is not read; convert it to text, or use --errors skip"
    )
