"""Parts: every machine comes to the same ones, which hold each file once."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.corpus.source_files import TextFile
from pretrain_cli.data.tokenizing.parts import deal, parse_part
from pretrain_cli.data.tokenizing.request import Part
from pretrain_cli.errors import ConfigError, DataError


def files(sizes):
    return [TextFile(f"/at/{n}", f"{n}", "at", size) for n, size in enumerate(sizes)]


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=60), data=st.data())
def test_each_file_is_in_one_part_and_parts_are_even(sizes, data):
    count = data.draw(st.integers(1, len(sizes)))
    corpus = files(sizes)
    parts = [deal(corpus, Part(number, count)) for number in range(1, count + 1)]
    assert sorted(file.name for part in parts for file in part) == sorted(f.name for f in corpus)
    for part in parts:
        assert part
        assert part == [file for file in corpus if file in part]
    loads = [sum(max(file.size, 1) for file in part) for part in parts]
    assert max(loads) - min(loads) <= max(max(sizes), 1)


def test_a_few_files_are_dealt_as_expected():
    parts = [deal(files([5, 9, 1, 4, 4]), Part(number, 2)) for number in (1, 2)]
    assert [[file.size for file in part] for part in parts] == [[9, 4], [5, 1, 4]]


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "-1/3", "1/3/5", "a/b", "", "1 /2"])
def test_what_is_not_a_part_is_refused(text):
    with pytest.raises(ConfigError) as error:
        parse_part(text)
    assert str(error.value) == f"--part: '{text}' is not k/n with k from 1 to n, such as 3/64"


def test_a_part_is_read():
    assert parse_part("3/64") == Part(3, 64)


@pytest.fixture
def corpus(tmp_path, write_documents):
    return write_documents(tmp_path / "corpus", ["one", "two words", "three words now"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dedup": True}, "--part: not with --dedup: .*, for example with datatrove$"),
        ({"tokenizer": "bpe"}, "--part: not with --tokenizer bpe: each part would train another"),
        ({"append": True}, "--part: not with --append: append to the merged dataset"),
        ({"format": "llm.c"}, r"--part: not with --format llm\.c: a merge doesn't write it"),
    ],
)
def test_options_that_need_the_whole_corpus_are_refused(corpus, make, tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        make(corpus, tmp_path / "made", part=Part(1, 2), **options)
    assert not (tmp_path / "made").exists()


def test_a_stream_cannot_be_dealt(corpus, make, tmp_path):
    os.mkfifo(tmp_path / "stream")
    with pytest.raises(ConfigError, match="--part: not with a stream: it can't be listed"):
        make([corpus, tmp_path / "stream"], tmp_path / "made", part=Part(1, 2))


def test_more_parts_than_files_are_refused(corpus, make, tmp_path):
    with pytest.raises(DataError, match="--part: 1/4 of 3 files; give at most as many parts"):
        make(corpus, tmp_path / "made", part=Part(1, 4))


def test_a_part_is_a_dataset_that_needs_no_second_run(corpus, make, tmp_path):
    first = make(corpus, tmp_path / "made", part=Part(2, 2))
    assert first.folder == tmp_path / "made/part-00002-of-00002"
    assert make(corpus, tmp_path / "made", part=Part(2, 2)).was_there
    (corpus / "00003.txt").write_text("one more")
    with pytest.raises(DataError, match="made with another part"):
        make(corpus, tmp_path / "made", part=Part(2, 2))
