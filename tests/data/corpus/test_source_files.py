"""Corpus files: found from names once each, in a fixed order, with the reasons for omissions."""

import os
import shutil

import pytest

from pretrain_cli.data.corpus.source_files import find_corpus
from pretrain_cli.errors import DataError


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Function that writes files in the current folder, each with its own name as content."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        return tmp_path

    monkeypatch.chdir(tmp_path)
    return make


def names(*asked, **options):
    return [file.name for file in find_corpus(list(map(str, asked)), **options).files]


def test_folders_are_searched_recursively_in_a_fixed_order(files):
    files("corpus/b.txt", "corpus/a.md", "corpus/sub/deeper/c.py", "corpus/sub/a.txt", "corpus/Z")
    expected = ["Z", "a.md", "b.txt", "sub/a.txt", "sub/deeper/c.py"]
    found = find_corpus(["corpus"]).files
    assert [file.name for file in found] == [f"corpus/{name}" for name in expected]
    assert [file.path.read_text() for file in found] == [f"corpus/{name}" for name in expected]


def test_hidden_files_and_caches_are_left_out(files):
    files("c/kept.txt", "c/.hidden.txt", "c/.git/config", "c/__pycache__/kept.txt")
    assert names("c") == ["c/kept.txt"]


def test_several_files_and_folders_come_in_the_order_given(files):
    files("folder/one.txt", "two.txt")
    assert names("two.txt", "folder") == ["two.txt", "folder/one.txt"]


def test_file_names_do_not_depend_on_the_location_of_the_corpus(files, monkeypatch):
    here = files("corpus/sub/a.txt")
    expected = ["corpus/sub/a.txt"]
    for asked in ("corpus", "corpus/", "./corpus", here / "corpus", "corpus/sub/.."):
        assert names(asked) == expected
    monkeypatch.chdir(here / "corpus")
    assert names(".") == expected
    shutil.move(here / "corpus", here / "elsewhere")
    assert names(here / "elsewhere") == ["elsewhere/sub/a.txt"]


def test_equal_names_in_different_folders_stay_distinct(files):
    files("one/a.txt", "two/a.txt", "two/b.txt")
    assert names("one", "two") == ["one/a.txt", "two/a.txt", "two/b.txt"]
    assert names("one/a.txt", "two/a.txt", "two/b.txt") == ["one/a.txt", "two/a.txt", "b.txt"]
    files("more/one/a.txt")
    assert names("one", "more/one") == ["one/a.txt", "more/one/a.txt"]


def test_a_pattern_selects_the_matching_files(files):
    files("c/a.txt", "c/b.md", "c/sub/d.txt", "c/sub/deep/e.txt")
    assert names("c/*.txt") == ["c/a.txt"]
    assert names("c/**/*.txt") == ["c/a.txt", "c/sub/d.txt", "c/sub/deep/e.txt"]
    assert names("c/*/*.txt") == ["c/sub/d.txt"]
    assert names("c/[ab].*") == ["c/a.txt", "c/b.md"]


def test_an_existing_file_wins_over_a_pattern_of_the_same_name(files):
    files("c/a[1].txt", "c/a1.txt")
    assert names("c/a[1].txt") == ["a[1].txt"]


def test_a_pattern_that_matches_nothing_is_refused(files):
    files("c/a.txt")
    with pytest.raises(DataError, match=r"c/\*\.md: no file matches it"):
        names("c/*.md")


def test_include_and_exclude_filter_folders_and_patterns(files):
    files("c/a.py", "c/a.txt", "c/sub/b.py", "c/sub/test_b.py", "c/sub/c.txt")
    assert names("c", include=["*.py"]) == ["c/a.py", "c/sub/b.py", "c/sub/test_b.py"]
    assert names("c", include=["*.py"], exclude=["test_*"]) == ["c/a.py", "c/sub/b.py"]
    assert names("c", exclude=["sub/*"]) == ["c/a.py", "c/a.txt"]  # a path, because of its slash
    assert names("c", include=["a.*", "c.*"]) == ["c/a.py", "c/a.txt", "c/sub/c.txt"]
    assert names("c/**/*.py", exclude=["test_*"]) == ["c/a.py", "c/sub/b.py"]
    assert names("c/a.txt", include=["*.py"]) == ["a.txt"]  # given by name, so not filtered
    with pytest.raises(DataError, match="c: no files in it that --include and --exclude leave"):
        names("c", include=["*.rs"])


def test_archives_and_non_files_in_folders_are_skipped_with_a_reason(files):
    files("c/a.txt", "c/b.zip", "c/c.tar.gz", "c/D.TAR", "c/e.txt.gz")
    os.mkfifo("c/pipe")
    os.symlink("nowhere", "c/broken")
    for asked in ("c", "c/*"):
        corpus = find_corpus([asked])
        assert [file.name for file in corpus.files] == ["c/a.txt", "c/e.txt.gz"]
        assert corpus.left_out == {
            "c/D.TAR": "an archive",
            "c/b.zip": "an archive",
            "c/broken": "not a regular file",
            "c/c.tar.gz": "an archive",
            "c/pipe": "not a regular file",
        }


def test_linked_and_unreadable_folders_are_skipped_with_a_reason(files, monkeypatch):
    """A link to a folder may form a cycle. A folder that can't be read must be reported."""
    files("c/a.txt", "c/closed/b.txt", "elsewhere/d.txt")
    os.symlink("../elsewhere", "c/link")
    real = os.scandir

    def scandir(path):
        if os.fspath(path) == "c/closed":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    corpus = find_corpus(["c"])
    assert [file.name for file in corpus.files] == ["c/a.txt"]
    assert corpus.left_out == {
        "c/link": "a link to a folder",
        "c/closed": "can't be read (Permission denied)",
    }


def test_an_archive_given_by_name_is_refused(files):
    """Otherwise its headers would be read as text."""
    files("books.tar.gz")
    with pytest.raises(DataError, match=r"books\.tar\.gz: an archive; unpack it"):
        names("books.tar.gz")


def test_datasets_and_runs_are_not_part_of_a_corpus(files):
    files("c/a.txt", "c/data/dataset.json", "c/data/tokenizer.json", "c/data/llm.c/x.bin")
    files("c/x.partial/files.jsonl", "c/x.partial/tokenizer.json", "c/x.partial/train-00000.bin")
    files("c/run/run.yaml", "c/run/metrics.jsonl", "c/other/dataset.json")
    assert names("c") == ["c/a.txt", "c/other/dataset.json"]
    said = "a dataset or a run, not text"
    assert find_corpus(["c"]).left_out == dict.fromkeys(["c/data", "c/run", "c/x.partial"], said)
    with pytest.raises(DataError, match=rf"c/data: no files in it \(c/data: {said}\); give a"):
        find_corpus(["c/data"])


def test_a_source_is_the_given_path_plus_the_first_subfolder(files):
    files("c/a.txt", "c/books/b.txt", "c/books/deep/c.txt", "c/web/d.txt", "single.txt")
    found = find_corpus(["c", "single.txt", "c/w*/*.txt"]).files
    assert [file.source for file in found] == [
        "c", "c/books", "c/books", "c/web", "single.txt", "c/w*/*.txt",
    ]  # fmt: skip


def test_a_corpus_records_file_sizes_and_modification_times(files):
    files("c/a.txt", "c/b.txt")
    os.utime("c/a.txt", ns=(1, 10**18 + 1))
    corpus = find_corpus(["c"])
    assert corpus.size == 14
    assert corpus.files[0].modified == 10**18 + 1
    assert not corpus.has_streams


def test_a_named_fifo_and_standard_input_are_streams(files):
    files("a.txt")
    os.mkfifo("pipe.jsonl")
    corpus = find_corpus(["a.txt", "pipe.jsonl", "-"])
    assert [file.is_stream for file in corpus.files] == [False, True, True]
    assert corpus.has_streams
    assert corpus.size == 5


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        find_corpus([str(tmp_path / "nowhere")])


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(DataError, match="no files in it; give a folder of text"):
        find_corpus([str(tmp_path)])


def test_the_error_for_an_unreadable_folder_names_the_reason(files, monkeypatch):
    files("c/a.txt")

    def scandir(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"c: no files in it \(c: can't be read \(Permission deni"):
        find_corpus(["c"])
