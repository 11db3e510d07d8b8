"""`pretrain tokenize`, as it is typed: text to a dataset folder, or one line that says why not."""

import json
import sysconfig
from pathlib import Path

import pytest
import tokenizers

FILES = {"dataset.json", "tokenizer.json", "tokenizer_config.json", "files.jsonl",
         "train-00000.bin", "train-00000.idx", "train-00000.crc",
         "val-00000.bin", "val-00000.idx", "val-00000.crc"}  # fmt: skip


def manifest(folder="data/corpus"):
    return json.loads(Path(folder, "dataset.json").read_text())


def test_a_folder_of_text_becomes_a_dataset(pretrain, corpus):
    outcome = pretrain("tokenize --tokenizer bytes --val-fraction 0.1 corpus/")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in Path("data/corpus").iterdir()} == FILES
    size = sum(path.stat().st_size for path in corpus.rglob("*.txt"))
    assert f"data/corpus: {size + 30:,} tokens of bytes" in outcome.out  # an end a document
    assert "from 30 documents, 12.4 kB of text" in outcome.out
    assert "pretrain train --data data/corpus" in outcome.out
    assert list(Path("data").iterdir()) == [Path("data/corpus")]


def test_a_published_tokenizer_makes_a_dataset(pretrain, corpus, tmp_path, monkeypatch):
    """The command of the README; where the real file is not there, one of the same form."""
    (tmp_path / "published/gemma3").mkdir(parents=True)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "wall": 1}, "<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "published/gemma3/tokenizer.json"))
    monkeypatch.setenv("PRETRAIN_TOKENIZERS", str(tmp_path / "published"))
    outcome = pretrain("tokenize --tokenizer gemma3 corpus/")
    assert outcome.code == 0, outcome.err
    assert manifest()["tokenizer"] == "gemma3"
    assert pretrain("tokenize corpus").out.startswith("data/corpus is up to date")  # the default


def test_several_files_of_jsonl_go_where_asked(pretrain, tmp_path):
    for name in ("a", "b"):
        row = json.dumps({"content": f"text of {name}"})
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n{row}\n")
    outcome = pretrain(
        "tokenize --tokenizer bytes a.jsonl b.jsonl --text-key content --out mine --val-fraction 0"
    )
    assert outcome.code == 0, outcome.err
    assert sum(shard["documents"] for shard in manifest("mine")["shards"]) == 4
    assert not Path("data").exists()


def test_bpe_is_trained_to_the_size_asked_for(pretrain, corpus):
    outcome = pretrain("tokenize --tokenizer bpe --vocab-size 300 corpus")
    assert outcome.code == 0, outcome.err
    assert manifest()["vocab_size"] == 300


def test_a_local_tokenizer_is_given_by_path(pretrain, corpus):
    assert pretrain("tokenize --tokenizer bpe --vocab-size 300 corpus").code == 0
    tokenizer = Path("data/corpus/tokenizer.json").read_bytes()
    for path in ("data/corpus", "data/corpus/tokenizer.json"):
        assert pretrain(f"tokenize --tokenizer {path} corpus --out again --force").code == 0
        for made in Path("data/corpus").glob("*.bin"):
            assert Path("again", made.name).read_bytes() == made.read_bytes()
        assert Path("again/tokenizer.json").read_bytes() == tokenizer


def test_again_on_the_same_files_it_says_so_and_does_nothing(pretrain, corpus):
    pretrain("tokenize --tokenizer bytes corpus")
    before = {path: path.stat().st_mtime_ns for path in Path("data/corpus").iterdir()}
    outcome = pretrain("tokenize --tokenizer bytes corpus/")
    assert outcome.code == 0
    assert "data/corpus is up to date" in outcome.out
    assert "--force" in outcome.out
    assert {path: path.stat().st_mtime_ns for path in Path("data/corpus").iterdir()} == before
    outcome = pretrain("tokenize --tokenizer bytes corpus --force")
    assert "up to date" not in outcome.out
    after = {path: path.stat().st_mtime_ns for path in Path("data/corpus").iterdir()}
    assert all(after[path] > before[path] for path in before)


def test_a_changed_corpus_is_not_tokenized_over_the_old_one_unasked(pretrain, refused, corpus):
    pretrain("tokenize --tokenizer bytes corpus")
    (corpus / "new.txt").write_text("one more")
    message = refused("tokenize --tokenizer bytes corpus")
    assert "data/corpus: holds a dataset made with another corpus" in message
    assert "--force" in message
    assert "--out" in message
    assert pretrain("tokenize --tokenizer bytes corpus --force").code == 0


def test_without_text_a_demo_is_made(pretrain, tmp_path, monkeypatch):
    (tmp_path / "python").mkdir()
    (tmp_path / "python/this.py").write_text("print('The Zen of Python')\n" * 20)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python")})
    outcome = pretrain("tokenize")
    assert outcome.code == 0, outcome.err
    assert Path("data/demo/dataset.json").is_file()


def test_files_that_are_not_text_are_skipped_named_and_counted(pretrain, corpus):
    (corpus / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    (corpus / "latin.txt").write_bytes("café".encode("latin-1"))
    outcome = pretrain("tokenize --tokenizer bytes corpus")
    assert outcome.code == 0, outcome.err
    assert "2 × not UTF-8, left out: corpus/latin.txt, corpus/picture.png" in outcome.out


def test_a_folder_named_in_markup_is_shown_as_it_is(pretrain, corpus):
    outcome = pretrain("tokenize --tokenizer bytes corpus --out 'data/[bold] :x:'")
    assert outcome.code == 0, outcome.err
    assert "data/[bold] :x:: " in outcome.out


# --- refused -------------------------------------------------------------------------------------


def test_a_path_that_does_not_exist(refused):
    assert refused("tokenize --tokenizer bytes nowhere") == "nowhere: no such file or folder"


def test_an_empty_corpus(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused("tokenize --tokenizer bytes empty") == (
        "empty: no files in it; give a folder of text"
    )
    (tmp_path / "empty/a.txt").write_text("")
    assert "empty: no text in its 1 files" in refused("tokenize --tokenizer bytes empty")


def test_a_corpus_of_nothing_but_pictures(refused, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "pictures" / name).write_bytes(b"\x89PNG\xff")
    message = refused("tokenize --tokenizer bytes pictures")
    assert message.startswith(
        "pictures: none of its 2 files is UTF-8 text (pictures/a.png the first)"
    )


def test_a_broken_json_line(refused, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "cut\n')
    message = refused("tokenize --tokenizer bytes a.jsonl")
    assert message.startswith("a.jsonl:2: not a JSON line (")
    assert "mend or remove it" in message


def test_a_json_line_without_the_key(refused, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "good"}\n')
    message = refused("tokenize --tokenizer bytes a.jsonl")
    assert message.startswith("a.jsonl:1: no text under 'text' (it has content)")
    assert "--text-key" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tokenizer gemma4", "did you mean gemma3?"),
        ("--tokenizer ./nowhere", "nowhere: no such tokenizer file; give a tokenizer.json"),
        ("--tokenizer corpus", "corpus/tokenizer.json: no such tokenizer file"),
        ("--tokenizer corpus/verse-00.txt", "corpus/verse-00.txt: not a tokenizer.json"),
        ("--tokenizer someone/model", "can't be reached"),
        ("--tokenizer bpe --vocab-size 100", "--vocab-size: 100 is too small"),
        ("--tokenizer bytes --vocab-size 100", "--vocab-size: 100 goes with --tokenizer bpe"),
        ("--tokenizer bytes --val-fraction 1.5", "--val-fraction: 1.5 is not from 0 up to 1"),
        ("--tokenizer bytes --out corpus", "corpus: exists and is not a dataset"),
        ("--tokenizer bytes --out corpus --force", "corpus: exists and is not a dataset"),
        ("--tokenizer bytes --out corpus/verse-00.txt/x", "corpus/verse-00.txt/x: can't be made"),
    ],
)
def test_options_that_cannot_be_honoured(refused, corpus, options, said):
    assert said in refused(f"tokenize {options} corpus")
