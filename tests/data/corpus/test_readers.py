"""Readers return a file's documents unchanged, for every compression and kind of input."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import threading

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.corpus import readers as module
from pretrain_cli.data.corpus.documents import ReadOptions
from pretrain_cli.data.corpus.readers import FileReader
from pretrain_cli.data.corpus.source_files import find_corpus
from pretrain_cli.errors import DataError

COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstd.compress(  # with a checksum, as the zstd command does
        data, options={zstd.CompressionParameter.checksum_flag: 1}
    ),
}


def read(path, **how):
    """Return (texts, remarks) of one file, and check the size and digest of each document."""
    (file,) = find_corpus([str(path)]).files
    reader = FileReader(file, ReadOptions(**how))
    found = []
    for document in reader.documents():
        data = b"".join(document.blocks)
        assert document.size == len(data) > 0
        assert document.digest == hashlib.blake2b(data, digest_size=16).digest()
        found.append(data.decode())
    if not file.is_stream:
        assert reader.position == file.size
        assert reader.checksum.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    return found, dict(reader.remarks)


def texts(path, **how):
    found, remarks = read(path, **how)
    assert not remarks
    return found


def refusal(path, **how):
    with pytest.raises(DataError) as error:
        read(path, **how)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.fixture(params=COMPRESS)
def packed(request, tmp_path):
    """Function that writes a file, uncompressed or in one of the compressed formats."""

    def write(name, data):
        path = tmp_path / f"{name}{request.param}"
        path.write_bytes(COMPRESS[request.param](data))
        return path

    return write


def send(path, data):
    """Write to a FIFO from another thread."""
    threading.Thread(target=path.write_bytes, args=(data,), daemon=True).start()


# --- plain files ---------------------------------------------------------------------------------


def test_text_is_not_changed(packed):
    text = "  two\r\nlines\r\n\n\ttab \x00 nul \ufeff mark — ünï 你好 👋  \n"
    assert texts(packed("a.txt", text.encode())) == [text]


def test_an_empty_file_has_no_documents(packed):
    for name in ("a.txt", "a.jsonl"):
        assert texts(packed(name, b"")) == []


def test_file_extensions_are_case_insensitive(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    assert texts(tmp_path / "A.JSONL.GZ") == ["one"]


def test_the_kind_option_overrides_the_file_extension(tmp_path):
    line = '{"text": "one"}\n'
    (tmp_path / "a.csv").write_text(line)
    (tmp_path / "b.jsonl").write_text(line)
    assert texts(tmp_path / "a.csv", kind="jsonl") == ["one"]
    assert texts(tmp_path / "b.jsonl", kind="text") == [line]


def test_a_byte_order_mark_at_the_beginning_of_a_file_is_dropped(packed):
    mark = b"\xef\xbb\xbf"
    assert texts(packed("a.txt", mark + b"one\n---\n" + mark + b"two"), separator="---") == [
        "one\n", "\ufefftwo",
    ]  # fmt: skip
    assert texts(packed("a.txt", mark)) == []


@pytest.mark.parametrize("held", [2, 2**23])
def test_a_document_with_many_nul_bytes_is_left_out(packed, monkeypatch, held):
    monkeypatch.setattr(module, "MAX_IN_MEMORY", held)
    wide = "words and words".encode("utf-16-le")  # without a mark
    few = b"a few\0 of them are text"
    path = packed("a.txt", wide + b"\n-\n" + few + b"\n-\n" + bytes(1000))
    for errors in ("skip", "replace"):
        found = read(path, separator="-", errors=errors)
        assert found == (["a few\0 of them are text\n"], {"many NUL bytes, left out": 2})
    assert refusal(path, separator="-", errors="fail") == (
        f"{path} from byte 0 on: many NUL bytes, not text, or UTF-16; convert it to UTF-8, or use "
        "--errors skip"
    )


# --- separators ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\n---\ntwo\n", ["one\n", "two\n"]),
        ("one\r\n---\r\ntwo\r\n", ["one\r\n", "two\r\n"]),
        ("---\none\n---\n", ["one\n"]),
        ("one\n---", ["one\n"]),
        ("one\n---\r", ["one\n"]),
        ("---", []),
        ("---\n---\n---\none", ["one"]),
        ("one\n ---\n--- \n----\nx---\n---x\n", ["one\n ---\n--- \n----\nx---\n---x\n"]),
        ("one---\n---\ntwo", ["one---\n", "two"]),
        ("one\n\ntwo\n---\n\nthree", ["one\n\ntwo\n", "\nthree"]),
        ("one\r---\rtwo", ["one\r---\rtwo"]),  # a carriage return alone does not end a line
    ],
)
def test_a_line_equal_to_the_separator_splits_documents(packed, content, expected):
    assert texts(packed("a.txt", content.encode()), separator="---") == expected


def test_without_a_separator_a_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n---\ntwo\n")
    assert texts(tmp_path / "a.txt") == ["one\n---\ntwo\n"]


def test_the_separator_is_literal_text_and_may_be_any_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\n.*\ntwo\n\nthree\n<|endoftext|>\nfour\n文 書\nfive")
    assert texts(tmp_path / "a.txt", separator=".*")[0] == "one\n"
    assert texts(tmp_path / "a.txt", separator="<|endoftext|>")[1] == "four\n文 書\nfive"
    assert texts(tmp_path / "a.txt", separator="文 書")[1] == "five"
    assert texts(tmp_path / "a.txt", separator="")[1] == "three\n<|endoftext|>\nfour\n文 書\nfive"


LINES = st.lists(st.sampled_from(["-", "--", "a", "é", "-a", "a-", "", "long " * 9]), max_size=12)


@given(
    lines=LINES,
    ends=st.lists(st.sampled_from(["\n", "\r\n"]), min_size=12, max_size=12),
    ends_itself=st.booleans(),
    separator=st.sampled_from(["-", "--", "", "é"]),
    block=st.integers(1, 40),
    held=st.sampled_from([5, 30, 1000]),
    kind=st.sampled_from(["", ".gz", "fifo"]),
)
def test_documents_are_the_text_between_separator_lines(
    tmp_path_factory, lines, ends, ends_itself, separator, block, held, kind
):
    """For any size of the read blocks and any limit on documents in memory."""
    whole = [line + end for line, end in zip(lines, ends, strict=False)]
    if whole and not ends_itself:
        whole[-1] = whole[-1].rstrip("\r\n")
    expected = [""]
    for line in whole:
        if line.removesuffix("\n").removesuffix("\r") == separator and line:
            expected.append("")
        else:
            expected[-1] += line
    path = tmp_path_factory.getbasetemp() / f"separated.txt{kind}"
    path.unlink(missing_ok=True)
    content = "".join(whole).encode()
    if kind == "fifo":
        os.mkfifo(path)
        send(path, content)
    else:
        path.write_bytes(COMPRESS[kind](content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "READ_BYTES", block)
        patch.setattr(module, "MAX_IN_MEMORY", held)
        assert texts(path, separator=separator) == [text for text in expected if text]


# --- invalid UTF-8 -------------------------------------------------------------------------------

BROKEN = {
    "latin-1": (b"caf\xe9!", "caf\ufffd!"),
    "cut": ("café".encode()[:-1], "caf\ufffd"),
    "overlong": (b"a\xc0\xafb", "a\ufffd\ufffdb"),
    "surrogate": (b"a\xed\xa0\x80b", "a\ufffd\ufffd\ufffdb"),
    "beyond": (b"a\xf4\x90\x80\x80b", "a\ufffd\ufffd\ufffd\ufffdb"),
}


@pytest.mark.parametrize("held", [2, 2**23])
@pytest.mark.parametrize("kind", BROKEN)
def test_the_errors_option_skips_replaces_or_refuses_invalid_utf8(packed, monkeypatch, kind, held):
    monkeypatch.setattr(module, "MAX_IN_MEMORY", held)
    data, replaced = BROKEN[kind]
    path = packed("a.txt", b"one\n-\n" + data + b"\n-\nthree\n-\n" + data + b"\n")
    how = {"separator": "-"}
    assert read(path, **how) == (["one\n", "three\n"], {"not UTF-8, left out": 2})
    assert read(path, errors="replace", **how) == (
        ["one\n", f"{replaced}\n", "three\n", f"{replaced}\n"],
        {"not UTF-8, replaced": 2},
    )
    assert refusal(path, errors="fail", **how) == (
        f"{path} from byte 6 on: not UTF-8; convert it, or use --errors skip or replace"
    )


@pytest.mark.parametrize("errors", [None, "skip", "replace", "fail"])
def test_the_errors_option_does_not_change_valid_utf8(packed, errors):
    text = "ünï 你好 \ufffd 👋"
    assert texts(packed("a.txt", text.encode()), errors=errors) == [text]


# --- long documents ------------------------------------------------------------------------------


@pytest.fixture(params=["plain", ".gz", ".zst", "fifo", "-"])
def way(request, tmp_path, monkeypatch):
    """Function that reads data as a file, FIFO or standard input, and returns texts and remarks."""

    def give(data, **how):
        if request.param == "-":
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
            (file,) = find_corpus(["-"]).files
            reader = FileReader(file, ReadOptions(**how))
            found = [(b"".join(d.blocks), d.size, d.digest) for d in reader.documents()]
            assert [(len(text), hashlib.blake2b(text, digest_size=16).digest())
                    for text, *_ in found] == [tuple(rest) for _, *rest in found]  # fmt: skip
            return [text.decode() for text, *_ in found], dict(reader.remarks)
        path = tmp_path / f"long.txt{request.param if request.param[0] == '.' else ''}"
        path.unlink(missing_ok=True)
        if request.param == "fifo":
            os.mkfifo(path)
            send(path, data)
        else:
            path.write_bytes(COMPRESS.get(request.param, bytes)(data))
        return read(path, **how)

    return give


@pytest.mark.parametrize(("block", "held"), [(3, 10), (7, 100), (64, 500)])
def test_a_document_too_long_for_memory_is_read_like_a_short_one(way, monkeypatch, block, held):
    long = "Grüße 你好 👋 \r\n\x00" * 60
    content = f"short\n---\n{long}\n---\nshort too\n---\n{long}{long}".encode()
    expected = way(content, separator="---")
    assert expected == (["short\n", f"{long}\n", "short too\n", long + long], {})
    monkeypatch.setattr(module, "READ_BYTES", block)
    monkeypatch.setattr(module, "MAX_IN_MEMORY", held)
    assert way(content, separator="---") == expected
    for mark in (b"", b"\xef\xbb\xbf"):
        assert way(mark + long.encode()) == ([long], {})


@pytest.mark.parametrize("broken", [b"\xe9", b"\xf0\x9f\x91"])
def test_invalid_utf8_at_the_end_drops_a_whole_long_document(way, monkeypatch, broken):
    monkeypatch.setattr(module, "READ_BYTES", 16)
    monkeypatch.setattr(module, "MAX_IN_MEMORY", 40)
    long = b"words and words " * 30 + broken
    replaced = "words and words " * 30 + "\ufffd"
    assert way(long) == ([], {"not UTF-8, left out": 1})
    assert way(long, errors="replace") == ([replaced], {"not UTF-8, replaced": 1})
    with pytest.raises(DataError, match="from byte 0 on: not UTF-8"):
        way(long, errors="fail")


# --- zstd ----------------------------------------------------------------------------------------


def test_without_backports_zstd_the_error_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(zstd.compress(b"words"))
    monkeypatch.setattr(sys, "version_info", (3, 13))
    monkeypatch.setitem(sys.modules, "backports", None)
    assert refusal(tmp_path / "a.txt.zst") == (
        f"{tmp_path / 'a.txt.zst'}: reading .zst takes backports.zstd; pip install backports.zstd"
    )


# --- damaged files -------------------------------------------------------------------------------

RANDOM = hashlib.shake_128(b"seed").digest(250_000).hex()  # several blocks when compressed


def damaged(how, data):
    middle = len(data) * 2 // 3
    return {
        "cut": data[:middle],
        "altered": data[:middle] + bytes(byte ^ 0x5A for byte in data[middle : middle + 40])
        + data[middle + 40 :],
        "other": b"no such thing",
    }[how]  # fmt: skip


@pytest.mark.parametrize("how", ["cut", "other"])
@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_documents_before_the_damage_in_a_file_are_kept(tmp_path, ending, how):
    whole = [RANDOM[start : start + 5000] for start in range(0, 500_000, 5000)]
    lines = "\n".join(json.dumps({"text": text}) for text in whole)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(damaged(how, COMPRESS[ending](lines.encode())))
    found, remarks = read_unfinished(path)
    assert found == whole[: len(found)]
    assert len(found) < len(whole)
    assert bool(found) == (how == "cut" and ending != ".bz2")  # a block of bzip2 is 900 kB
    assert remarks == {"damaged; documents that end before that are kept": 1}
    for errors in (None, "fail"):
        message = refusal(path, errors=errors)
        assert message.startswith(f"{path}: damaged (")
        count = f"{len(found)} records" if found else "0 documents"
        assert message.endswith(
            f") after {count}; get it again, or keep what comes before that with --errors skip"
        )


def test_lines_before_the_damage_in_a_short_file_are_kept(tmp_path):
    """The format is recognized by first bytes that the damage is among."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n')[:-4])
    remarks = {"damaged; documents that end before that are kept": 1}
    assert read_unfinished(path) == (["one", "two"], remarks)


def read_unfinished(path):
    """Return (texts, remarks) of a damaged file, which is not read to its end."""
    (file,) = find_corpus([str(path)]).files
    reader = FileReader(file, ReadOptions(errors="skip"))
    return [b"".join(document.blocks).decode() for document in reader.documents()], reader.remarks


@pytest.mark.parametrize("how", ["cut", "altered", "other"])
@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("held", [100, 2**23])
def test_a_document_cut_off_by_damage_is_left_out(tmp_path, monkeypatch, ending, how, held):
    monkeypatch.setattr(module, "MAX_IN_MEMORY", held)
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(damaged(how, COMPRESS[ending](RANDOM.encode())))
    assert read_unfinished(path) == ([], {"damaged; documents that end before that are kept": 1})
    assert ") after 0 documents; get it again" in refusal(path)


def test_concatenated_compressed_streams_are_one_file(tmp_path):
    for ending in (".gz", ".bz2", ".xz", ".zst"):
        path = tmp_path / f"a.txt{ending}"
        path.write_bytes(COMPRESS[ending](b"one, ") + COMPRESS[ending](b"two"))
        assert texts(path) == ["one, two"]


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("closed")

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(module, "open", refuse, raising=False)
    assert refusal(path) == f"{path}: can't be read (Permission denied)"
