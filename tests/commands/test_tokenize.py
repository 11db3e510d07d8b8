"""`pretrain tokenize`, run from the command line: a dataset folder, or one error line."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tokenizers
from backports import zstd
from pyarrow import parquet

import pretrain_cli
from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer

FILES = {"dataset.json", "encoding.json", "tokenizer.json", "tokenizer_config.json", "files.jsonl",
         "train-00000.bin", "train-00000.idx", "train-00000.crc",
         "val-00000.bin", "val-00000.idx", "val-00000.crc"}  # fmt: skip


def manifest(folder="data/corpus"):
    return json.loads(Path(folder, "dataset.json").read_text())


def test_a_folder_of_text_becomes_a_dataset(pretrain, corpus):
    outcome = pretrain("tokenize --tokenizer bytes --val-fraction 0.1 corpus/")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in Path("data/corpus").iterdir()} == FILES
    size = sum(path.stat().st_size for path in corpus.rglob("*.txt"))
    assert f"data/corpus: {size + 30:,} tokens of bytes" in outcome.out  # 30 end-of-document tokens
    assert "from 30 documents, 12.4 kB of text" in outcome.out
    assert "pretrain train --data data/corpus" in outcome.out
    assert list(Path("data").iterdir()) == [Path("data/corpus")]


def test_a_published_tokenizer_makes_a_dataset(pretrain, corpus, tmp_path, monkeypatch):
    """The README's command, with a stand-in file of the same format for the published tokenizer."""
    (tmp_path / "published/gemma3").mkdir(parents=True)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "wall": 1}, "<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "published/gemma3/tokenizer.json"))
    monkeypatch.setenv("PRETRAIN_TOKENIZERS", str(tmp_path / "published"))
    outcome = pretrain("tokenize --tokenizer gemma3 corpus/")
    assert outcome.code == 0, outcome.err
    assert manifest()["tokenizer"] == "gemma3"
    assert pretrain("tokenize corpus").out.startswith("data/corpus is up to date")  # the default


def test_several_jsonl_files_are_written_to_the_out_folder(pretrain, tmp_path):
    for name in ("a", "b"):
        row = json.dumps({"content": f"text of {name}"})
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n{row}\n")
    outcome = pretrain(
        "tokenize --tokenizer bytes a.jsonl b.jsonl --text-key content --out mine --val-fraction 0"
    )
    assert outcome.code == 0, outcome.err
    assert sum(shard["documents"] for shard in manifest("mine")["shards"]) == 4
    assert not Path("data").exists()


def test_bpe_is_trained_to_the_given_vocabulary_size(pretrain, corpus):
    outcome = pretrain("tokenize --tokenizer bpe --vocab-size 300 corpus")
    assert outcome.code == 0, outcome.err
    assert manifest()["vocab_size"] == 300
    assert "A vocabulary of" not in outcome.out


def test_bpe_on_a_short_text_gets_a_smaller_vocabulary_and_name(pretrain, tmp_path):
    (tmp_path / "a.txt").write_text("aaaa " * 9)  # merges: aa, aaaa, and the word with its space
    outcome = pretrain("tokenize --tokenizer bpe --vocab-size 5000 a.txt")
    assert outcome.code == 0, outcome.err
    assert (manifest("data/a")["vocab_size"], manifest("data/a")["tokenizer"]) == (260, "bpe-260")
    assert "A vocabulary of 260 tokens, not 5,000: the text has nothing more to" in outcome.out


def test_a_local_tokenizer_is_given_by_path(pretrain, corpus):
    assert pretrain("tokenize --tokenizer bpe --vocab-size 300 corpus").code == 0
    tokenizer = Path("data/corpus/tokenizer.json").read_bytes()
    for path in ("data/corpus", "data/corpus/tokenizer.json"):
        assert pretrain(f"tokenize --tokenizer {path} corpus --out again --force").code == 0
        for made in Path("data/corpus").glob("*.bin"):
            assert Path("again", made.name).read_bytes() == made.read_bytes()
        assert Path("again/tokenizer.json").read_bytes() == tokenizer


def test_tokenizing_unchanged_files_again_does_nothing(pretrain, corpus):
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


def test_a_changed_corpus_needs_force_to_replace_the_dataset(pretrain, refused, corpus):
    pretrain("tokenize --tokenizer bytes corpus")
    (corpus / "new.txt").write_text("one more")
    message = refused("tokenize --tokenizer bytes corpus")
    assert "data/corpus: holds a dataset made with another corpus" in message
    assert "--force" in message
    assert "--out" in message
    assert pretrain("tokenize --tokenizer bytes corpus --force").code == 0


def test_tokenize_without_arguments_makes_the_demo_dataset(pretrain, tmp_path, monkeypatch):
    (tmp_path / "python").mkdir()
    (tmp_path / "python/this.py").write_text("print('The Zen of Python')\n" * 20)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python")})
    outcome = pretrain("tokenize")
    assert outcome.code == 0, outcome.err
    assert Path("data/demo/dataset.json").is_file()


def test_files_that_are_not_text_are_skipped_named_and_counted(pretrain, corpus):
    (corpus / "picture").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    (corpus / "latin.txt").write_bytes("café".encode("latin-1"))
    (corpus / "latin-too.txt").write_bytes("café".encode("latin-1"))
    outcome = pretrain("tokenize --tokenizer bytes corpus")
    assert outcome.code == 0, outcome.err
    assert "2 × not UTF-8, left out: corpus/latin-too.txt, corpus/latin.txt" in outcome.out
    assert "1 × PNG image, left out: corpus/picture" in outcome.out


def test_markup_in_a_folder_name_is_printed_unchanged(pretrain, corpus):
    outcome = pretrain("tokenize --tokenizer bytes corpus --out 'data/[bold] :x:'")
    assert outcome.code == 0, outcome.err
    assert "data/[bold] :x:: " in outcome.out


# --- input ---------------------------------------------------------------------------------------


def tokens(folder="data/corpus", split="train"):
    """Read a split's tokens: bytes of the documents, each document ending with 256."""
    found = []
    for path in sorted(Path(folder).glob(f"{split}-*.bin")):
        found += np.fromfile(path, "<u2").tolist()
    return found


def row(*texts):
    return [token for text in texts for token in (*text.encode(), 256)]


ALL_TRAIN = "--tokenizer bytes --val-fraction 0"


def test_standard_input_is_a_document(pretrain):
    outcome = pretrain(f"tokenize {ALL_TRAIN} -", "one – ü\n\ntwo".encode())
    assert outcome.code == 0, outcome.err
    assert tokens("data/stdin") == row("one – ü\n\ntwo")


def test_standard_input_accepts_the_formats_of_files(pretrain):
    lines = '{"body": "one"}\n{"body": "two"}\n'
    assert pretrain(f"tokenize {ALL_TRAIN} --input jsonl --text-key body -", lines).code == 0
    assert tokens("data/stdin") == row("one", "two")
    assert (
        pretrain(f"tokenize {ALL_TRAIN} --document-separator '' - --out b", "one\n\ntwo").code == 0
    )
    assert tokens("b") == row("one\n", "two")


def test_standard_input_of_a_process_is_read_to_its_end(pretrain, tmp_path):
    """Pipe 3 MB, which arrive in several chunks."""
    command = [sys.executable, "-m", "pretrain_cli", "tokenize", *ALL_TRAIN.split(), "-"]
    environment = {**os.environ, "PYTHONPATH": str(Path(pretrain_cli.__file__).parent.parent)}
    text = "words and words\n" * 200_000
    done = subprocess.run(command, input=text.encode(), capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert tokens("data/stdin") == row(text)


def test_a_quoted_pattern_is_expanded_by_the_program(pretrain, corpus):
    outcome = pretrain(f"tokenize {ALL_TRAIN} 'corpus/**/*-2[89].txt'")
    assert outcome.code == 0, outcome.err
    assert tokens() == row(*[(corpus / f"more/verse-{n}.txt").read_text() for n in (28, 29)])
    assert manifest()["sources"].keys() == {"corpus/**/*-2[89].txt"}


def test_include_and_exclude_select_the_files_of_a_folder(pretrain, corpus):
    options = "--include '*-0?.txt' --include '*-1?.txt' --exclude '*5.txt'"
    assert pretrain(f"tokenize {ALL_TRAIN} corpus {options}").code == 0
    assert manifest()["sources"]["corpus"]["files"] == 18


@pytest.mark.parametrize(
    ("ending", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstd.compress),
    ],
)
def test_compressed_files_are_read_and_give_the_dataset_its_name(pretrain, ending, compress):
    Path(f"books.jsonl{ending}").write_bytes(compress(b'{"text": "one"}\n{"text": "two"}'))
    outcome = pretrain(f"tokenize {ALL_TRAIN} books.jsonl{ending}")
    assert outcome.code == 0, outcome.err
    assert tokens("data/books") == row("one", "two")


def test_a_column_of_parquet_is_read(pretrain):
    table = pyarrow.table({"id": [1, 2, 3], "content": ["one", None, "two"]})
    parquet.write_table(table, "rows.parquet")
    assert pretrain(f"tokenize {ALL_TRAIN} rows.parquet --text-key content").code == 0
    assert tokens("data/rows") == row("one", "two")


@pytest.mark.parametrize(
    ("errors", "kept", "said"),
    [
        ("skip", ["good\n", "good too"], "1 × not UTF-8, left out: a.txt"),
        ("replace", ["good\n", "caf\ufffd\n", "good too"], "1 × not UTF-8, replaced: a.txt"),
    ],
)
def test_invalid_utf8_is_skipped_or_replaced_with_a_notice(pretrain, errors, kept, said):
    Path("a.txt").write_bytes(b"good\n--\ncaf\xe9\n--\ngood too")
    outcome = pretrain(f"tokenize {ALL_TRAIN} a.txt --document-separator -- --errors {errors}")
    assert outcome.code == 0, outcome.err
    assert tokens("data/a") == row(*kept)
    assert said in outcome.out
    assert manifest("data/a")["options"]["errors"] == errors


def test_a_damaged_file_stops_unless_its_rest_may_be_skipped(pretrain, refused, corpus):
    (corpus / "z.txt.gz").write_bytes(gzip.compress(b"words " * 999)[:-9])
    message = refused("tokenize --tokenizer bytes corpus")
    assert message.startswith("corpus/z.txt.gz: damaged (")
    assert message.endswith(
        " after 0 documents; get it again, or keep what comes before that with --errors skip"
    )
    assert not Path("data").exists() or not list(Path("data").iterdir())
    outcome = pretrain("tokenize --tokenizer bytes corpus --errors skip")
    assert outcome.code == 0, outcome.err
    assert "1 × damaged; documents that end before that are kept: corpus/z.txt.gz" in outcome.out


def test_files_that_are_left_out_are_named_with_the_reason(pretrain, corpus):
    for number in range(4):
        (corpus / f"{number}.zip").touch()
    os.mkfifo(corpus / "pipe")
    os.symlink("more", corpus / "link")
    outcome = pretrain("tokenize --tokenizer bytes corpus")
    assert outcome.code == 0, outcome.err
    assert "Left out corpus/0.zip: an archive" in outcome.out
    assert outcome.out.count("Left out corpus/") == 5
    assert "Left out 1 more such files" in outcome.out


def test_dedup_leaves_out_duplicate_documents(pretrain, corpus):
    (corpus / "again.txt").write_bytes((corpus / "verse-07.txt").read_bytes())
    outcome = pretrain("tokenize --tokenizer bytes corpus --dedup")
    assert outcome.code == 0, outcome.err
    assert "1 duplicate documents are left out" in outcome.out
    assert "from 30 documents" in outcome.out


# --- output --------------------------------------------------------------------------------------


def test_append_adds_new_files(pretrain, corpus):
    assert pretrain("tokenize --tokenizer bytes --val-fraction 0.1 corpus").code == 0
    (corpus / "new.txt").write_text("one more")
    again = "tokenize --tokenizer bytes --val-fraction 0.1 corpus --append"
    outcome = pretrain(again)
    assert outcome.code == 0, outcome.err
    assert "from 31 documents" in outcome.out
    assert pretrain(again).out.startswith("data/corpus is up to date")


def test_bos_eos_shard_size_and_format_options_take_effect(pretrain, corpus, tmp_path):
    backend = tokenizers.Tokenizer.from_str(load_tokenizer("bytes").json)
    backend.add_special_tokens(["<s>"])
    backend.save("mine.json")
    options = "--tokenizer mine.json --bos '<s>' --eos '<s>' --shard-tokens 1024 --format llm.c"
    outcome = pretrain(f"tokenize {options} corpus --val-fraction 0")
    assert outcome.code == 0, outcome.err
    found = tokens()
    assert (found.count(257), found.count(256)) == (60, 0)
    assert {shard["tokens"] for shard in manifest()["shards"][:-1]} == {1024}
    assert Path("data/corpus/llm.c/corpus_train_000001.bin").is_file()


def test_special_tokens_are_text_unless_allowed(pretrain):
    Path("a.txt").write_text("a<|endoftext|>b")
    assert pretrain(f"tokenize {ALL_TRAIN} a.txt").code == 0
    assert tokens("data/a") == row("a<|endoftext|>b")
    assert pretrain(f"tokenize {ALL_TRAIN} a.txt --allow-special --force").code == 0
    assert tokens("data/a") == row("a", "b")


def test_any_number_of_workers_makes_the_same_dataset(pretrain, corpus, monkeypatch):
    monkeypatch.setattr("pretrain_cli.data.tokenizing.pipeline.SMALL", 0)
    monkeypatch.setattr("pretrain_cli.data.tokenizing.pipeline.TASK_BYTES", 1000)
    seen = []
    for workers in (1, 3):
        outcome = pretrain(f"tokenize --tokenizer bytes corpus --workers {workers} --force")
        assert outcome.code == 0, outcome.err
        seen.append({path.name: path.read_bytes() for path in Path("data/corpus").iterdir()})
        assert json.loads(seen[-1].pop("encoding.json"))["bytes_per_second"] > 0
    assert seen[0] == seen[1]


# --- refused -------------------------------------------------------------------------------------


def test_a_path_that_does_not_exist_is_refused(refused):
    assert refused("tokenize --tokenizer bytes nowhere") == "nowhere: no such file or folder"


def test_an_empty_corpus_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused("tokenize --tokenizer bytes empty") == (
        "empty: no files in it; give a folder of text"
    )
    (tmp_path / "empty/a.txt").write_text("")
    assert "empty: no text in its 1 file;" in refused("tokenize --tokenizer bytes empty")


def test_a_corpus_without_utf8_text_is_refused(refused, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "pictures" / name).write_bytes(b"\x89P\xff")
    message = refused("tokenize --tokenizer bytes pictures")
    assert message.startswith("pictures: no UTF-8 text in its 2 files (pictures/a.png the first)")


def test_a_broken_json_line_is_refused(refused, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "cut\n')
    message = refused("tokenize --tokenizer bytes a.jsonl")
    assert message.startswith("a.jsonl:2: not a JSON line (")
    assert "mend or remove it" in message


def test_a_json_line_without_the_text_key_is_refused(refused, tmp_path):
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
        ("--tokenizer bpe --vocab-size 0", "--vocab-size: 0 is too small"),
        ("--tokenizer bytes --vocab-size 100", "--vocab-size: 100 goes with --tokenizer bpe"),
        ("--tokenizer bytes --val-fraction 1.5", "--val-fraction: 1.5 is not from 0 up to 1"),
        ("--tokenizer bytes --out corpus", "corpus: exists and is not a dataset"),
        ("--tokenizer bytes --out corpus --force", "corpus: exists and is not a dataset"),
        ("--tokenizer bytes --out .", "--out: '.' has no name of its own; name a folder"),
        ("--tokenizer bytes --out corpus/..", "--out: 'corpus/..' has no name of its own"),
        (
            "--tokenizer bytes --out data/x.partial",
            "--out: 'data/x.partial' is where data/x lies until it is whole; choose another name",
        ),
        ("--tokenizer bytes --out corpus/verse-00.txt/x", "corpus/verse-00.txt/x: can't be made"),
        ("--tokenizer bytes --bos '<s>'", "--bos: '<s>' is no token of bytes; name one that is"),
        ("--tokenizer bytes --eos '<s>'", "--eos: '<s>' is no token of bytes; name one that is"),
        ("--tokenizer bytes --workers 0", "--workers: 0 is not at least 1"),
        ("--tokenizer bytes --shard-tokens 1023", "--shard-tokens: 1023 is not at least 1,024"),
        ("--tokenizer bytes --append", "data/corpus: no dataset there to append to"),
        ("--tokenizer bytes --append --force", "--append and --force: the one keeps what is there"),
        ("--tokenizer bpe --append", "--append: a 'bpe' is trained on its corpus"),
        (
            "--tokenizer bytes --document-separator '\n'",
            "is more than a line; give the line alone",
        ),
        ("--tokenizer bytes --include '*.rs'", "corpus: no files in it that --include and --exclu"),
        ("--tokenizer bytes --input parquet --errors fail", "corpus/verse-00.txt: damaged ("),
        ("--tokenizer bytes --input jsonl", "corpus/verse-00.txt:1: not a JSON line ("),
        ("--tokenizer bytes 'corpus/*.md'", "corpus/*.md: no file matches it"),
        ("--tokenizer bytes nowhere", "nowhere: no such file or folder"),
        ("--tokenizer bpe -", "bpe: is trained on the text first, and standard input can be read"),
    ],
)
def test_invalid_tokenize_options_are_refused(refused, corpus, options, said):
    assert said in refused(f"tokenize {options} corpus")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.txt",
            b"caf\xe9",
            "a.txt from byte 0 on: not UTF-8; convert it, or use --errors skip or",
        ),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: not UTF-8; convert it, or use --errors"),
        ("a.txt.gz", gzip.compress(b"words", mtime=0)[:-9], "a.txt.gz: damaged ("),
        ("a.txt.bz2", b"words", "a.txt.bz2: damaged (Invalid data stream) after 0"),
        ("a.parquet", b"PAR1 words", "a.parquet: damaged ("),
        ("a.tar.gz", b"", "a.tar.gz: an archive; unpack it"),
    ],
)
def test_errors_fail_refuses_unreadable_files(refused, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    message = refused(f"tokenize --tokenizer bytes --errors fail {name}")
    assert message.startswith(said)


def test_a_corpus_without_an_intact_document_is_refused(refused, tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"words")
    assert refused("tokenize --tokenizer bytes --errors skip a.txt.gz") == (
        "a.txt.gz: damaged from the beginning on (a.txt.gz); get it again"
    )


def test_a_parquet_file_without_the_text_column_is_refused(refused):
    parquet.write_table(pyarrow.table({"id": [1], "content": ["text"]}), "a.parquet")
    assert refused("tokenize --tokenizer bytes a.parquet") == (
        "a.parquet: no column 'text' (it has id, content); name the column with --text-key"
    )
    assert refused("tokenize --tokenizer bytes a.parquet --text-key id") == (
        "a.parquet: column 'id' holds int64, not text; name another with --text-key"
    )


def test_too_little_disk_space_is_refused_at_the_start(refused, corpus, monkeypatch):
    monkeypatch.setattr("pretrain_cli.data.tokenizing.pipeline.TASK_BYTES", 1000)
    usage = shutil.disk_usage(".")._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert refused("tokenize --tokenizer bytes corpus") == (
        "data/corpus: the dataset will take about 0.0 GB more, and 0.0 GB are free there; free "
        "some, or choose another place"
    )


# --- on several machines -------------------------------------------------------------------------


def test_parts_are_merged_into_one_dataset(pretrain, corpus):
    for number in (1, 2):
        outcome = pretrain(f"tokenize --tokenizer bytes corpus/ --part {number}/2")
        assert outcome.code == 0, outcome.err
        assert (
            "When all parts are there: pretrain tokenize --merge data/corpus/part-*" in outcome.out
        )
    merged = "tokenize --merge data/corpus/part-00001-of-00002 data/corpus/part-00002-of-00002"
    outcome = pretrain(merged)
    assert outcome.code == 0, outcome.err
    assert "from 30 documents, 12.4 kB of text" in outcome.out
    assert "Train on it: pretrain train --data data/corpus" in outcome.out
    assert {shard["split"] for shard in manifest()["shards"]} == {"train", "val"}
    assert pretrain(merged).out.startswith("data/corpus is up to date: these parts are merged.")


@pytest.mark.parametrize("option", ["--tokenizer bytes", "--dedup", "--shard-tokens 4096"])
def test_a_merge_takes_no_options_of_tokenizing(pretrain, corpus, option):
    outcome = pretrain(f"tokenize --merge {option} data/corpus/part-1")
    assert outcome.code == 2
    assert outcome.err == (
        f"error: --merge: takes no {option.split()[0]}; the parts say how they were made\n"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("corpus/ --part 3/2", "--part: '3/2' is not k/n with k from 1 to n"),
        ("corpus/ --part 1/31 --tokenizer bytes", "--part: 1/31 of 30 files"),
        ("corpus/ --part 1/2 --dedup", "--part: not with --dedup: "),
        ("--merge", "--merge: no parts given"),
        ("--merge corpus", "corpus: no dataset.json in it"),
    ],
)
def test_a_wrong_part_or_merge_is_one_line(pretrain, corpus, options, said):
    outcome = pretrain(f"tokenize {options}")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {said}")
    assert outcome.err.count("\n") == 1
    assert not Path("data").exists()
