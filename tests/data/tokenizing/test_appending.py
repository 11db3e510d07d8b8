"""Appending to a dataset: only new files are tokenized, and existing shards stay unchanged."""

import json
import os
import shutil
from pathlib import Path

import pytest

from pretrain_cli.data.corpus.documents import ReadOptions
from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.data.tokenizing import encoder, pipeline
from pretrain_cli.errors import ConfigError, DataError

OLD = [f"Old text {number}, {'words ' * (number % 5)}\n" for number in range(30)]
NEW = [f"New text {number}, {'words ' * (number % 5)}\n" for number in range(20)]


@pytest.fixture
def corpus(tmp_path, write_documents, make):
    """Path of `corpus/`, tokenized into `made`, with files added since. They sort before the old
    ones."""
    write_documents(tmp_path / "corpus/old", OLD)
    make(tmp_path / "corpus", tmp_path / "made", val_fraction=0.3)
    write_documents(tmp_path / "corpus/new", NEW)
    return tmp_path / "corpus"


def documents(read_back, folder):
    return {split: {bytes(ids[:-1]).decode() for ids in read_back(folder, split)}
            for split in ("train", "val")}  # fmt: skip


def test_only_new_files_are_tokenized_and_old_shards_stay(
    tmp_path, corpus, make, read_back, contents, monkeypatch
):
    before = contents(tmp_path / "made")
    texts = documents(read_back, tmp_path / "made")
    fingerprint = open_dataset(tmp_path / "made").fingerprint
    encoded = []
    real = encoder.LibraryEncoder.encode

    def counted(self, texts, continues):
        encoded.extend(text.decode() for text in texts)
        return real(self, texts, continues)

    monkeypatch.setattr(encoder.LibraryEncoder, "encode", counted)
    result = make(corpus, tmp_path / "made", val_fraction=0.3, append=True)
    assert encoded == NEW
    after = contents(tmp_path / "made")
    for name, data in before.items():
        if name.endswith((".bin", ".idx", ".crc", "tokenizer.json")):
            assert after[name] == data
    assert after["files.jsonl"].startswith(before["files.jsonl"])
    assert open_dataset(tmp_path / "made").fingerprint != fingerprint
    found = documents(read_back, tmp_path / "made")
    assert found["train"] | found["val"] == {*OLD, *NEW}
    assert texts["train"] < found["train"]
    assert texts["val"] < found["val"]
    assert result.manifest.total.documents == 50
    assert result.manifest.total.bytes == len("".join(OLD + NEW))
    assert {name: amount.files for name, amount in result.manifest.sources.items()} == {
        "corpus/old": 30, "corpus/new": 20,
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "made"]


def test_appending_without_new_files_does_nothing(tmp_path, corpus, make, contents):
    make(corpus, tmp_path / "made", val_fraction=0.3, append=True)
    before = contents(tmp_path / "made")
    result = make(corpus, tmp_path / "made", val_fraction=0.3, append=True)
    assert result.was_there
    assert contents(tmp_path / "made") == before


def test_a_dataset_can_be_appended_to_repeatedly(
    tmp_path, corpus, make, write_documents, read_back
):
    for number in range(3):
        make(corpus, tmp_path / "made", val_fraction=0.3, append=True)
        write_documents(corpus / f"more {number}", [f"more {number}\n"])
    make(corpus, tmp_path / "made", val_fraction=0.3, append=True)
    found = documents(read_back, tmp_path / "made")
    assert found["train"] | found["val"] == {*OLD, *NEW, "more 0\n", "more 1\n", "more 2\n"}


def test_another_corpus_can_be_appended(tmp_path, corpus, make, write_documents, read_back):
    other = write_documents(tmp_path / "other", ["of another corpus\n"])
    manifest = make(other, tmp_path / "made", val_fraction=0.3, append=True).manifest
    found = documents(read_back, tmp_path / "made")
    assert found["train"] | found["val"] == {*OLD, "of another corpus\n"}
    assert manifest.paths == [str(corpus), str(other)]


def test_copies_of_validation_documents_are_held_out_again(
    tmp_path, corpus, make, write_documents, read_back
):
    held_out = documents(read_back, tmp_path / "made")["val"]
    write_documents(corpus / "copies", OLD)
    make(corpus, tmp_path / "made", val_fraction=0.3, append=True)
    found = documents(read_back, tmp_path / "made")
    assert held_out < found["val"]
    assert not held_out & found["train"]


def test_duplicates_of_documents_in_the_dataset_are_left_out(
    tmp_path, make, write_documents, read_back, contents
):
    made = tmp_path / "made"
    options = {"dedup": True, "val_fraction": 0}
    write_documents(tmp_path / "corpus/1", [*OLD, *OLD[:3]])
    assert make(tmp_path / "corpus", made, **options).manifest.duplicates == 3
    write_documents(tmp_path / "corpus/2", [*OLD[5:9], *NEW, *NEW[:2]])
    manifest = make(tmp_path / "corpus", made, append=True, **options).manifest
    assert manifest.duplicates == 3 + 4 + 2
    assert read_back(made, "train") == [[*text.encode(), 256] for text in OLD + NEW]
    write_documents(tmp_path / "corpus/3", [NEW[7], "last\n"])
    assert make(tmp_path / "corpus", made, append=True, **options).manifest.duplicates == 10


def test_a_killed_append_resumes_where_it_stopped(
    tmp_path, corpus, make, driven, contents, monkeypatch
):
    shutil.copytree(tmp_path / "made", tmp_path / "straight/made")
    monkeypatch.chdir(tmp_path)
    result = make(Path("corpus"), Path("straight/made"), val_fraction=0.3, append=True)
    assert not result.resumed
    arguments = ["tokenize", "corpus", "--tokenizer", "bytes", "--val-fraction", "0.3",
                 "--append", "--out", "made"]  # fmt: skip
    changes = {"pretrain_cli.data.tokenizing.pipeline.SECONDS_BETWEEN_SAVES": 0,
               "pretrain_cli.data.tokenizing.pipeline.TASK_BYTES": 30}  # fmt: skip
    for function, call in (
        ("os.link", 3),
        ("pretrain_cli.data.tokenizing.writer.DatasetWriter.save_progress", 1),
        ("pretrain_cli.data.tokenizing.writer.DatasetWriter.save_progress", 5),
        ("pretrain_cli.data.tokenizing.writer.DatasetWriter.finish", 1),
    ):
        before = contents(tmp_path / "made")
        assert driven(arguments, tmp_path, changes, (function, call)).code == -9
        assert contents(tmp_path / "made") == before
    result = make(Path("corpus"), Path("made"), val_fraction=0.3, append=True)
    assert result.resumed
    found, straight = (contents(tmp_path / name) for name in ("made", "straight/made"))
    manifest, expected = (json.loads(files.pop("dataset.json")) for files in (found, straight))
    assert found == straight
    assert manifest.pop("paths") == expected.pop("paths") == [str(corpus), "corpus"]
    assert manifest == expected


def test_the_disk_space_check_counts_only_new_files(
    tmp_path, make, write_documents, monkeypatch, corpus
):
    """Tokens that the dataset already has are not counted."""
    free = 2 * 3 * sum(map(len, NEW))
    write_documents(tmp_path / "long", ["word " * 100_000])
    make(tmp_path / "long", tmp_path / "made", val_fraction=0.3, append=True)
    monkeypatch.setattr(pipeline, "TASK_BYTES", 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, free))
    make(corpus, tmp_path / "made", val_fraction=0.3, append=True)


# --- refused -------------------------------------------------------------------------------------


@pytest.fixture
def refusal(tmp_path, make, contents):
    """Function that returns the error message, and checks that no file was changed."""

    def check(corpus, **options):
        before = contents(tmp_path)
        with pytest.raises((DataError, ConfigError)) as error:
            make(corpus, tmp_path / "made", **{"val_fraction": 0.3, "append": True} | options)
        assert contents(tmp_path) == before
        message = str(error.value)
        assert "\n" not in message
        return message

    return check


def test_a_changed_old_file_is_refused(tmp_path, corpus, refusal):
    path = corpus / "old/00007.txt"
    path.write_text("changed")
    assert refusal(corpus) == (
        f"{path}: not what {tmp_path / 'made'} has under the name corpus/old/00007.txt; rename it "
        "if it is another file, or tokenize all again with --force if it has changed"
    )


def test_an_old_file_with_only_a_new_time_is_accepted(tmp_path, corpus, make):
    os.utime(corpus / "old/00007.txt", ns=(0, 0))
    make(corpus, tmp_path / "made", val_fraction=0.3, append=True)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"val_fraction": 0.2}, "val-fraction"),
        ({"dedup": True, "bos": "none"}, "bos, dedup"),
        ({"reading": ReadOptions(errors="replace")}, "errors"),
        ({"shard_tokens": 2000}, "shard-tokens"),
        ({"tokenizer": "bpe"}, ""),
    ],
)
def test_appending_with_other_options_is_refused(corpus, refusal, options, what):
    message = refusal(corpus, **options)
    if what:
        assert f"made: holds a dataset made with another {what}; replace it" in message
    else:
        assert "--append: a 'bpe' is trained on its corpus, which would be another" in message


def test_another_tokenizer_in_the_same_file_is_refused(tmp_path, make, write_documents, load):
    corpus = write_documents(tmp_path / "corpus", OLD)
    (tmp_path / "mine.json").write_text(load("bytes").json)
    mine = {"tokenizer": str(tmp_path / "mine.json"), "val_fraction": 0}
    make(corpus, tmp_path / "made", **mine)
    (tmp_path / "mine.json").write_text(load("bpe").json)
    write_documents(corpus / "new", NEW)
    with pytest.raises(DataError, match="made with another tokenizer"):
        make(corpus, tmp_path / "made", append=True, **mine)


def test_appending_without_a_dataset_is_refused(tmp_path, corpus, make):
    with pytest.raises(DataError, match="nowhere: no dataset there to append to; leave --append"):
        make(corpus, tmp_path / "nowhere", append=True)


def test_append_and_force_together_are_refused(corpus, refusal):
    assert refusal(corpus, force=True).startswith("--append and --force: the one keeps")


# --- a trained tokenizer -------------------------------------------------------------------------


def test_new_files_can_be_tokenized_with_the_datasets_own_bpe(
    tmp_path, make, write_documents, monkeypatch
):
    """The error for --tokenizer bpe tells the user to do this."""
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "corpus/old", OLD)
    first = make("corpus", Path("made"), tokenizer="bpe", vocab_size=280)
    write_documents(tmp_path / "corpus/new", NEW)
    with pytest.raises(ConfigError, match="give the dataset's own with --tokenizer made"):
        make("corpus", Path("made"), tokenizer="bpe", vocab_size=280, append=True)
    manifest = make("corpus", Path("made"), tokenizer="made", append=True).manifest
    assert manifest.total.documents >= 50
    assert manifest.tokenizer == first.manifest.tokenizer == "bpe-280"
    assert manifest.options == first.manifest.options
    assert make("corpus", Path("made"), tokenizer="made", append=True).was_there


def test_a_datasets_own_tokenizer_keeps_its_document_marks(
    tmp_path, make, marked, write_documents, read_back
):
    corpus = write_documents(tmp_path / "corpus", ["one"])
    made = tmp_path / "made"
    make(corpus, made, tokenizer=str(marked(begins=True)), bos="none", val_fraction=0)
    (corpus / "two.txt").write_text("two")
    make(corpus, made, tokenizer=str(made), append=True, val_fraction=0)
    assert read_back(made, "train") == [[*b"one", 256], [*b"two", 256]]
    (corpus / "three.txt").write_text("three")
    with pytest.raises(DataError, match="made with another bos; replace it"):
        make(corpus, made, tokenizer=str(made), bos="<s>", append=True, val_fraction=0)
