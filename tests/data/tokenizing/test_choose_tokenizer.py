"""The tokenizer of a dataset in the making is opened once, and trained only for a new dataset."""

import pytest

from pretrain_cli.data.shards import read_manifest
from pretrain_cli.data.tokenizers.tokenizer import train_bpe
from pretrain_cli.data.tokenizing import choose_tokenizer as module
from pretrain_cli.errors import DataError


@pytest.fixture
def counted(monkeypatch):
    """Count how often tokenizers are loaded and trained."""
    counts = {"load_tokenizer": 0, "train_bpe": 0}
    for name in counts:
        real = getattr(module, name)

        def counting(*arguments, name=name, real=real):
            counts[name] += 1
            return real(*arguments)

        monkeypatch.setattr(module, name, counting)
    return counts


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"text number {number}, and some words more")
    return folder


@pytest.fixture
def tokenizer_file(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    train_bpe(iter(["text number and some words more"] * 20), 270).save(folder)
    return folder / "tokenizer.json"


def test_a_tokenizer_file_is_opened_once_in_each_run(
    tmp_path, make, corpus, counted, tokenizer_file
):
    for run in (1, 2):  # the second compares the file with the finished dataset
        result = make(corpus, tmp_path / "made", tokenizer=str(tokenizer_file))
        assert result.was_there is (run == 2)
        assert counted["load_tokenizer"] == run
    (corpus / "new.txt").write_text("a new text")
    result = make(corpus, tmp_path / "made", tokenizer=str(tokenizer_file), append=True)
    assert counted["load_tokenizer"] == 3
    assert sum(part.documents for part in result.manifest.sources.values()) == 6


def test_a_bpe_is_trained_for_a_new_dataset_only(tmp_path, make, corpus, counted):
    for _ in range(2):
        make(corpus, tmp_path / "made", tokenizer="bpe", vocab_size=260)
        assert counted == {"load_tokenizer": 0, "train_bpe": 1}
    manifest = read_manifest(tmp_path / "made")
    assert manifest.tokenizer == f"bpe-{manifest.vocab_size}"


def test_appending_with_another_tokenizer_is_refused(tmp_path, make, corpus, tokenizer_file):
    make(corpus, tmp_path / "made", tokenizer="bytes")
    (corpus / "new.txt").write_text("a new text")
    with pytest.raises(DataError, match="another tokenizer"):
        make(corpus, tmp_path / "made", tokenizer=str(tokenizer_file), append=True)
