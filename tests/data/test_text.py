"""Files and folders in, documents out, in an order and form that never vary."""

import os
import shutil

import pytest

from pretrain_cli.data.text import find_corpus
from pretrain_cli.errors import DataError


def texts(*paths, text_key="text"):
    return [document.text for document in find_corpus(paths, text_key).documents()]


def test_folders_are_searched_to_the_bottom_in_a_fixed_order(tmp_path):
    for name in ("b.txt", "a.md", "sub/deeper/c.py", "sub/a.txt", "Z.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    expected = ["Z.txt", "a.md", "b.txt", "sub/a.txt", "sub/deeper/c.py"]
    assert texts(tmp_path) == expected
    assert find_corpus([tmp_path], "text").names == expected


def test_hidden_files_and_caches_are_left_out(tmp_path):
    for name in ("kept.txt", ".hidden.txt", ".git/config", "__pycache__/kept.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert texts(tmp_path) == ["kept.txt"]


def test_several_files_and_folders_come_in_the_order_given(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/one.txt").write_text("one")
    (tmp_path / "two.txt").write_text("two")
    assert texts(tmp_path / "two.txt", tmp_path / "folder") == ["two", "one"]


def test_a_suffix_limits_what_folders_give(tmp_path):
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "a.txt").write_text("b")
    assert find_corpus([tmp_path], "text", ".py").names == ["a.py"]


def test_text_is_taken_as_it_is(tmp_path):
    text = "  two\r\nlines\r\n\n\ttab \x00 nul \ufeff mark — ünï 你好 👋  \n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (document,) = find_corpus([tmp_path], "text").documents()
    assert document.text == text
    assert document.size == len(text.encode())


def test_empty_files_are_no_documents(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    assert texts(tmp_path) == ["b"]


def test_a_line_of_jsonl_is_a_document(tmp_path):
    first = b'\xef\xbb\xbf{"text": "one\\ntwo", "id": 1}\n\n'  # a byte order mark, a blank line
    (tmp_path / "a.jsonl").write_bytes(first + b'{"text": "\\ud83d\\ude00"}\n{"text": ""}')
    assert texts(tmp_path) == ["one\ntwo", "😀"]


def test_the_text_of_jsonl_may_be_under_another_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 5, "content": "this"}\n')
    assert texts(tmp_path, text_key="content") == ["this"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "cut', "not a JSON line"),
        (b"plain words", "not a JSON line"),
        (b'{"txt": "other"}', "no text under 'text' (it has txt)"),
        (b'{"text": 5}', "no text under 'text'"),
        (b'["text"]', "no text under 'text' (it has a list)"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "half \\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_a_broken_json_line_is_named_with_its_number(tmp_path, line, what):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError) as error:
        texts(tmp_path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert what in str(error.value)


def test_a_file_that_is_not_utf8_is_skipped_and_remembered(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "c.txt").write_text("café")
    corpus = find_corpus([tmp_path], "text")
    for _ in range(2):  # a second reading counts them afresh
        assert [document.text for document in corpus.documents()] == ["café"]
        assert [path.name for path in corpus.skipped] == ["a.txt", "b.png"]


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        find_corpus([tmp_path / "nowhere"], "text")


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(DataError, match="no files in it"):
        find_corpus([tmp_path], "text")


def test_what_is_neither_file_nor_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: not a regular file or a folder"):
        find_corpus([tmp_path / "pipe"], "text")


def test_the_digest_changes_with_any_file_and_not_with_the_place(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    (here / "a.txt").write_text("a")

    def digest(place, text_key="text"):
        return find_corpus([place], text_key).digest()

    seen = [digest(here), digest(here, "content")]
    shutil.copytree(here, tmp_path / "there")  # copies times too
    assert digest(tmp_path / "there") == seen[0]
    (here / "b.txt").write_text("b")
    seen.append(digest(here))
    (here / "b.txt").write_text("c")  # as long, only newer
    os.utime(here / "b.txt", ns=(0, 10**18))
    seen.append(digest(here))
    (here / "b.txt").rename(here / "c.txt")
    seen.append(digest(here))
    assert len(set(seen)) == len(seen)
