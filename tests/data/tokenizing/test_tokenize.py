"""Tokenizing: every document is in the right split once, or no dataset is written."""

import gzip
import hashlib
import json
import os
import re
import shutil
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import tokenizers
from backports import zstd
from pyarrow import parquet

from pretrain_cli.data.corpus import readers
from pretrain_cli.data.corpus.documents import ReadOptions
from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer, read_tokenizer
from pretrain_cli.data.tokenizing import blocks, encoder, encoding, pipeline
from pretrain_cli.data.tokenizing.tokenize import demo_request, tokenize
from pretrain_cli.errors import ConfigError, DataError, PretrainError
from tests.data.conftest import encode_documents

TEXTS = [f"Document {number}: äöü, {'words ' * (number % 7)}\n" for number in range(40)]


def tokens(texts):
    return [[*text.encode(), 256] for text in texts]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2", "gemma3", "llama2"])
def test_documents_are_encoded_as_by_the_tokenizers_library(
    load, tmp_path, kind, make, write_documents, read_back
):
    if kind != "bpe":
        load(kind)  # skips without its file
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    size = {"vocab_size": 300} if kind == "bpe" else {}
    result = make(corpus, tmp_path / "made", tokenizer=kind, val_fraction=0.3, **size)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "made/tokenizer.json"))
    before = {"gemma3": [2], "llama2": [1]}.get(kind, [])
    end = {"bytes": 256, "gpt2": 50_256, "gemma3": 1, "llama2": 2, "bpe": 0}[kind]
    expected = [
        [*before, *library.encode(text, add_special_tokens=False).ids, end] for text in TEXTS
    ]
    train, val = (read_back(tmp_path / "made", split) for split in ("train", "val"))
    assert train == [ids for ids in expected if ids in train]  # in the corpus's order
    assert val == [ids for ids in expected if ids in val]
    assert len(train) + len(val) == len(TEXTS)
    assert not [ids for ids in train if ids in val]
    assert 0 < len(val) < 24
    manifest = result.manifest
    sizes = sum(len(text.encode()) for text in TEXTS)
    assert manifest.total.bytes == sizes
    assert manifest.splits["train"].tokens == sum(map(len, train))
    assert manifest.splits["val"].documents == len(val)


def test_a_corpus_larger_than_a_batch_keeps_its_order(
    tmp_path, monkeypatch, make, write_documents, read_back
):
    monkeypatch.setattr(pipeline, "TASK_BYTES", 100)
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    make(corpus, tmp_path / "made", val_fraction=0)
    assert read_back(tmp_path / "made", "train") == [[*text.encode(), 256] for text in TEXTS]
    assert read_back(tmp_path / "made", "val") == []


def test_files_of_different_formats_make_one_dataset(tmp_path, make, read_back):
    """Documents are in the order of the file names, then of their position in the file."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("b1", "b2"))
    (corpus / "a.txt.gz").write_bytes(gzip.compress(b"a1\n---\na2\n"))
    (corpus / "b.jsonl.zst").write_bytes(zstd.compress(rows.encode()))
    parquet.write_table(pyarrow.table({"text": ["c1", None, "c2"]}), corpus / "c.parquet")
    (corpus / "d.bin").write_bytes(b"\xff")
    (corpus / "e.txt").write_bytes(b"e1\r\n---\r\ne2")
    result = make(corpus, tmp_path / "made", val_fraction=0, reading=ReadOptions(separator="---"))
    texts = ["a1\n", "a2\n", "b1", "b2", "c1", "c2", "e1\r\n", "e2"]
    assert read_back(tmp_path / "made", "train") == tokens(texts)
    assert result.manifest.remarks == {"null, left out": 1, "not UTF-8, left out": 1}
    assert result.remarked == {
        "null, left out": ["corpus/c.parquet"],
        "not UTF-8, left out": ["corpus/d.bin"],
    }


def test_streams_are_read_like_files(tmp_path, make, read_back, fill_pipe):
    for name, data in (("one.jsonl", b'{"text": "one"}\n'), ("two.gz", gzip.compress(b"two"))):
        fill_pipe(tmp_path / name, data)
    (tmp_path / "three.txt").write_text("three")
    names = [tmp_path / name for name in ("one.jsonl", "two.gz", "three.txt")]
    result = make(names, tmp_path / "made", val_fraction=0, workers=2)
    assert read_back(tmp_path / "made", "train") == tokens(["one", "two", "three"])
    assert result.manifest.total.bytes == 11


def test_training_a_bpe_on_a_stream_is_refused(tmp_path, make):
    """After training, the stream would be empty or block forever when it is tokenized."""
    os.mkfifo(tmp_path / "pipe")
    for name, shown in ((tmp_path / "pipe", tmp_path / "pipe"), ("-", "standard input")):
        with pytest.raises(ConfigError) as error:
            make(name, tmp_path / "made", tokenizer="bpe")
        assert str(error.value) == (
            f"--tokenizer bpe: is trained on the text first, and {shown} can be read once; "
            "save it to a file"
        )


# --- long documents ------------------------------------------------------------------------------


@pytest.fixture
def long_documents_are_short(monkeypatch):
    """Treat documents of a few kB as too long for memory."""
    monkeypatch.setattr(readers, "READ_BYTES", 1000)
    monkeypatch.setattr(readers, "MAX_IN_MEMORY", 3000)
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 2000)
    monkeypatch.setattr(pipeline, "TASK_BYTES", 5000)
    monkeypatch.setattr(encoder, "PIECE", 500)


LONG = [" ".join(f"word{number}, {'äöü' * (number % 5)}" for number in range(first, first + 900))
        for first in (0, 100, 200)]  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "llama2"])
@pytest.mark.parametrize("how", ["plain", "gz", "stream"])
def test_long_documents_give_the_same_tokens_as_short_ones(
    tmp_path, load, make, read_back, how, kind, request, fill_pipe
):
    load(kind)  # skips without its file
    joined = "\n---\n".join(["short", LONG[0], "also short", *LONG[1:]]).encode()
    path = tmp_path / {"plain": "a.txt", "gz": "a.txt.gz", "stream": "pipe"}[how]

    def tokenized(name):
        if how == "stream":
            path.unlink(missing_ok=True)
            fill_pipe(path, joined)
        else:
            path.write_bytes(gzip.compress(joined) if how == "gz" else joined)
        result = make(path, tmp_path / name, tokenizer=kind, val_fraction=0.5,
                      reading=ReadOptions(separator="---"))  # fmt: skip
        amounts = [result.manifest.splits, result.manifest.sources]
        return [read_back(tmp_path / name, split) for split in ("train", "val")], amounts

    expected = tokenized("short")
    assert sum(map(len, expected[0])) == 5
    request.getfixturevalue("long_documents_are_short")
    assert tokenized("long") == expected


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_long_document_with_a_non_utf8_end_is_left_out_whole(
    tmp_path, make, read_back, long_documents_are_short, ending
):
    data = "\n---\n".join(["first", LONG[0]]).encode() + b"\xff\n---\nlast"
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(gzip.compress(data) if ending else data)
    how = {"val_fraction": 0}
    result = make(path, tmp_path / "made", reading=ReadOptions(separator="---"), **how)
    assert read_back(tmp_path / "made", "train") == tokens(["first\n", "last"])
    assert result.manifest.remarks == {"not UTF-8, left out": 1}
    assert result.manifest.total.bytes == len("first\nlast")
    make(path, tmp_path / "replaced", reading=ReadOptions(separator="---", errors="replace"), **how)
    texts = ["first\n", f"{LONG[0]}\ufffd\n", "last"]
    assert read_back(tmp_path / "replaced", "train") == tokens(texts)


# --- held out for validation ---------------------------------------------------------------------


def test_a_hash_of_the_text_alone_decides_a_documents_split(
    tmp_path, make, write_documents, read_back
):
    """File names and other documents do not matter. The hash is BLAKE2b."""
    held_out = [
        text for text in TEXTS
        if int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "little")
        < 0.25 * 2**64
    ]  # fmt: skip
    assert 3 < len(held_out) < 20
    for name, texts in (("here", TEXTS), ("there", TEXTS[::-1] + TEXTS)):
        make(write_documents(tmp_path / name, texts), tmp_path / "made", val_fraction=0.25,
             force=True)  # fmt: skip
        val = {bytes(ids[:-1]).decode() for ids in read_back(tmp_path / "made", "val")}
        assert val == set(held_out)
        train = {bytes(ids[:-1]).decode() for ids in read_back(tmp_path / "made", "train")}
        assert train == set(TEXTS) - val


def test_documents_keep_their_split_when_the_corpus_grows(
    tmp_path, make, write_documents, read_back
):
    texts = [f"text number {number}" for number in range(600)]
    for count, name in ((300, "small"), (600, "large")):
        make(write_documents(tmp_path / name, texts[:count]), tmp_path / f"{name}-made",
             val_fraction=0.1)  # fmt: skip
    small, large = (
        {split: {bytes(ids[:-1]).decode() for ids in read_back(tmp_path / f"{name}-made", split)}
         for split in ("train", "val")}
        for name in ("small", "large")
    )  # fmt: skip
    assert small["val"] < large["val"]
    assert small["train"] < large["train"]
    assert 30 < len(large["val"]) < 95  # a tenth of 600, within four standard deviations


def test_a_larger_fraction_holds_out_a_superset(tmp_path, make, write_documents, read_back):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    held_out = []
    for number, fraction in enumerate((0.1, 0.3, 0.6)):
        make(corpus, tmp_path / f"made-{number}", val_fraction=fraction)
        held_out.append({tuple(ids) for ids in read_back(tmp_path / f"made-{number}", "val")})
    assert held_out[0] < held_out[1] < held_out[2]


@pytest.mark.parametrize("by_hash", ["train", "val"])
def test_the_tail_of_a_single_document_is_held_out(tmp_path, monkeypatch, by_hash, make, read_back):
    """The hash may choose either split, but neither split may be empty."""
    monkeypatch.setattr(encoding, "are_held_out", lambda digests, fraction: by_hash == "val")
    text = "".join(chr(97 + number % 26) for number in range(999))
    (tmp_path / "book.txt").write_text(text)
    result = make(tmp_path / "book.txt", tmp_path / "made", val_fraction=0.1)
    (train,), (val,) = (read_back(tmp_path / "made", split) for split in ("train", "val"))
    assert train + val == [*text.encode(), 256]
    assert len(val) == 100  # a tenth of 1000 tokens
    assert result.manifest.splits["train"].bytes == 900
    assert result.manifest.splits["val"].bytes == 99
    open_dataset(tmp_path / "made")


def test_a_tail_that_begins_at_a_document_is_whole_documents(
    tmp_path, monkeypatch, make, write_documents, read_back
):
    monkeypatch.setattr(encoding, "are_held_out", lambda digests, fraction: False)
    texts = ["a" * 49] * 6  # 50 tokens each
    make(write_documents(tmp_path / "corpus", texts), tmp_path / "made", val_fraction=0.5)
    assert list(map(len, read_back(tmp_path / "made", "train"))) == [50, 50, 50]
    assert list(map(len, read_back(tmp_path / "made", "val"))) == [50, 50, 50]


def test_a_cut_inside_a_character_loses_no_byte(tmp_path, make, read_back):
    text = "é" * 500
    (tmp_path / "book.txt").write_text(text)
    for fraction in (0.1, 0.101):
        result = make(tmp_path / "book.txt", tmp_path / "made", val_fraction=fraction, force=True)
        (train,), (val,) = (read_back(tmp_path / "made", split) for split in ("train", "val"))
        assert bytes(train + val[:-1]).decode() == text
        assert result.manifest.total.bytes == 1000


def test_the_tail_of_one_document_in_several_shards_is_held_out(tmp_path, make, read_back):
    """The hashes put some of these documents into train and others into val."""
    for number in range(20):
        text = f"{number} " + "abcdefghij" * 250
        (tmp_path / "book.txt").write_text(text)
        result = make(tmp_path / "book.txt", tmp_path / "made", val_fraction=0.5, force=True,
                      shard_tokens=1024)  # fmt: skip
        (train,), (val,) = (read_back(tmp_path / "made", split) for split in ("train", "val"))
        assert train + val == tokens([text])[0]
        assert len(val) == round(len(train + val) / 2)
        assert result.manifest.total.bytes == len(text)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_a_val_fraction_outside_0_to_1_is_refused(tmp_path, fraction, make):
    with pytest.raises(ConfigError, match=f"--val-fraction: {fraction} is not from 0 up to 1"):
        make(tmp_path, tmp_path / "made", val_fraction=fraction)


# --- duplicates ----------------------------------------------------------------------------------


def test_dedup_leaves_out_duplicates(tmp_path, make, write_documents, read_back):
    """The first copy stays, within a file and across files, also of a long document."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "one", "new"))
    for name in ("a", "b"):
        write_documents(tmp_path / f"corpus/{name}", ["one", LONG[0], f"only {name}", "one\n"])
        (tmp_path / f"corpus/{name}/lines.jsonl").write_text(lines)
    made = tmp_path / "made"
    result = make(tmp_path / "corpus", made, dedup=True, val_fraction=0)
    kept = ["one", LONG[0], "only a", "one\n", "two", "new", "only b"]
    assert read_back(made, "train") == tokens(kept)
    assert result.manifest.duplicates == 16 - 7
    assert result.manifest.total.bytes == len("".join(kept).encode())
    result = make(tmp_path / "corpus", tmp_path / "all", val_fraction=0)
    assert len(read_back(tmp_path / "all", "train")) == 16
    assert result.manifest.duplicates == 0


def test_a_file_of_only_duplicates_has_a_row_in_files_jsonl(
    tmp_path, make, write_documents, read_back
):
    corpus = write_documents(tmp_path / "corpus", ["one", "one", "one"])
    made = tmp_path / "made"
    result = make(corpus, made, dedup=True, val_fraction=0)
    assert read_back(made, "train") == tokens(["one"])
    assert [row["documents"] for row in rows(made)] == [1, 0, 0]
    assert result.manifest.sources["corpus"].files == 3


# --- marks and special tokens --------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [False, True])
def test_special_tokens_in_a_text_are_text_unless_allowed(
    tmp_path, make, marked, read_back, allowed
):
    text = "a<sep>b <|endoftext|></s>"
    (tmp_path / "a.txt").write_text(text)
    make(tmp_path / "a.txt", tmp_path / "made", tokenizer=str(marked()), allow_special=allowed,
         val_fraction=0)  # fmt: skip
    expected = [97, 259, 98, 32, 256, 258] if allowed else [*text.encode()]
    assert read_back(tmp_path / "made", "train") == [[*expected, 256]]


@pytest.mark.parametrize(
    ("marks", "begin", "end"),
    [
        ({}, None, 256),
        ({"bos": "<s>", "eos": "</s>"}, 257, 258),
        ({"bos": "<sep>"}, 259, 256),
        ({"bos": "none", "eos": "<sep>"}, None, 259),
    ],
)
def test_chosen_document_marks_are_stored_with_the_dataset(
    tmp_path, make, marked, read_back, marks, begin, end
):
    (tmp_path / "a.txt").write_text("text")
    made = tmp_path / "made"
    result = make(tmp_path / "a.txt", made, tokenizer=str(marked()), val_fraction=0, **marks)
    expected = [*([] if begin is None else [begin]), *b"text", end]
    assert read_back(made, "train") == [expected]
    assert result.manifest.beginning_of_document == begin
    assert result.manifest.end_of_document == end
    open_dataset(made).tokenizer.save(_made(tmp_path / "saved"))
    for tokenizer in (
        open_dataset(made).tokenizer,
        read_tokenizer(made / "tokenizer.json", name="theirs"),
        load_tokenizer(str(tmp_path / "saved")),
    ):
        assert (tokenizer.bos, tokenizer.eos) == (begin, end)
        assert encode_documents(tokenizer, ["text"]) == [expected]


def test_a_tokenizers_own_bos_token_can_be_left_out(tmp_path, make, marked, read_back):
    (tmp_path / "a.txt").write_text("text")
    for bos, begin in ((None, [257]), ("none", [])):
        make(tmp_path / "a.txt", tmp_path / "made", tokenizer=str(marked(begins=True)), bos=bos,
             force=True, val_fraction=0)  # fmt: skip
        assert read_back(tmp_path / "made", "train") == [[*begin, *b"text", 256]]
        assert open_dataset(tmp_path / "made").tokenizer.bos == (begin[0] if begin else None)


@pytest.mark.parametrize("option", ["bos", "eos"])
def test_a_document_mark_that_is_not_a_token_is_refused(tmp_path, make, marked, option):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=f"--{option}: '<end>' is no token of .*; name one"):
        make(tmp_path / "a.txt", tmp_path / "made", tokenizer=str(marked()), **{option: "<end>"})
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "made.partial").exists()


def _made(folder):
    folder.mkdir()
    return folder


# --- manifest and files.jsonl --------------------------------------------------------------------


def rows(folder):
    return [json.loads(line) for line in (folder / "files.jsonl").read_text().splitlines()]


def test_every_file_has_a_row_and_the_rows_add_up(tmp_path, make, write_documents):
    corpus = tmp_path / "corpus"
    for name, texts in (("books", TEXTS[:9]), ("web/deep", TEXTS[9:20]), (".", TEXTS[20:])):
        write_documents(corpus / name, texts)
    (corpus / "web/many.jsonl").write_text('{"text": "one"}\n{"text": "caf\\ud800"}\n' * 5)
    (corpus / "empty.txt").touch()
    made = tmp_path / "made"
    manifest = make(corpus, made, val_fraction=0.3).manifest
    found = rows(made)
    for row in found:
        data = (tmp_path / row["name"]).read_bytes()
        assert row["size"] == len(data)
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["modified"] == (tmp_path / row["name"]).stat().st_mtime_ns
        if row["name"].endswith(".txt"):
            count = int(row["size"] > 0)
            assert (row["documents"], row["bytes"]) == (count, row["size"])
            assert row["tokens"] == row["size"] + count
            assert row["remarks"] == {}
    (many,) = [row for row in found if row["name"] == "corpus/web/many.jsonl"]
    assert (many["documents"], many["bytes"], many["tokens"]) == (5, 15, 20)
    assert many["remarks"] == {"not UTF-8, left out": 5}
    assert manifest.remarks == many["remarks"]
    for key in ("documents", "bytes", "tokens"):
        total = sum(row[key] for row in found)
        assert total == getattr(manifest.total, key)
        assert total == sum(getattr(amount, key) for amount in manifest.sources.values())
        for source, amount in manifest.sources.items():
            of = [row[key] for row in found if row["source"] == source]
            assert sum(of) == getattr(amount, key)
    files = Counter(row["source"] for row in found)
    assert files == {name: amount.files for name, amount in manifest.sources.items()}
    assert files == {"corpus": 21, "corpus/books": 9, "corpus/web": 12}


def test_the_manifest_records_the_options(tmp_path, make, write_documents):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    reading = ReadOptions(separator="--", errors="replace")
    options = make(corpus, tmp_path / "made", val_fraction=0.2, dedup=True, bos="none",
                   reading=reading).manifest.options  # fmt: skip
    assert options == {
        "tokenizer": "bytes", "vocab_size": None, "bos": "none", "eos": None,
        "allow_special": False, "val_fraction": 0.2, "dedup": True, "text_key": "text",
        "document_separator": "--", "errors": "replace", "input": "auto",
        "shard_tokens": 2**27, "format": "pretrain",
    }  # fmt: skip


def test_file_names_that_are_not_utf8_are_recorded_legibly(tmp_path, make, read_back):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.txt")).write_text("text")
    manifest = make(folder, tmp_path / "made", val_fraction=0).manifest
    assert read_back(tmp_path / "made", "train") == tokens(["text"])
    assert [row["name"] for row in rows(tmp_path / "made")] == [r"caf\xe9/\xff.txt"]
    assert list(manifest.sources) == [r"caf\xe9"]
    assert make(folder, tmp_path / "made", val_fraction=0).was_there


# --- a second request ----------------------------------------------------------------------------


def test_the_same_request_on_the_same_files_does_nothing(
    tmp_path, monkeypatch, make, write_documents
):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    first = make(corpus, tmp_path / "made")
    before = (tmp_path / "made/dataset.json").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    for path in (corpus, Path("corpus")):  # absolute and relative
        again = make(path, tmp_path / "made")
        assert again.was_there
        assert not first.was_there
        assert again.manifest == first.manifest
        assert (tmp_path / "made/dataset.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokenizer": "bpe"}, "tokenizer"),
        ({"val_fraction": 0.2}, "val-fraction"),
        ({"corpus": "other"}, "corpus"),
    ],
)
def test_another_request_replaces_a_dataset_only_with_force(
    tmp_path, change, what, make, write_documents, contents
):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    make(corpus, tmp_path / "made")
    before = contents(tmp_path / "made")
    change = dict(change)
    if name := change.pop("corpus", None):
        corpus = write_documents(tmp_path / name, [*TEXTS[1:], "another text"])
    with pytest.raises(DataError) as error:
        make(corpus, tmp_path / "made", **change)
    assert f"made with another {what}; replace it with --force" in str(error.value)
    assert contents(tmp_path / "made") == before
    assert not make(corpus, tmp_path / "made", force=True, **change).was_there
    assert contents(tmp_path / "made") != before


def test_another_tokenizer_in_the_same_file_is_another_request(
    load, tmp_path, make, write_documents
):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    (tmp_path / "mine").mkdir()
    load("bytes").save(tmp_path / "mine")
    make(corpus, tmp_path / "made", tokenizer=str(tmp_path / "mine"))
    assert make(corpus, tmp_path / "made", tokenizer=str(tmp_path / "mine")).was_there
    load("bpe").save(tmp_path / "mine")
    with pytest.raises(DataError, match="made with another tokenizer; replace it with --force"):
        make(corpus, tmp_path / "made", tokenizer=str(tmp_path / "mine"))


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ("gema3", "tokenizer 'gema3' is not one of gemma3, .*; did you mean gemma3"),
        ("nowhere/tokenizer.json", "nowhere/tokenizer.json: no such tokenizer file"),
    ],
)
@pytest.mark.parametrize("append", [False, True])
def test_an_unknown_tokenizer_is_reported_even_if_a_dataset_exists(
    tmp_path, make, write_documents, contents, tokenizer, said, append
):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    make(corpus, tmp_path / "made")
    before = contents(tmp_path / "made")
    with pytest.raises(PretrainError, match=said):
        make(corpus, tmp_path / "made", tokenizer=tokenizer, append=append)
    assert contents(tmp_path / "made") == before


def test_a_dataset_is_up_to_date_without_its_tokenizer_file(load, tmp_path, make, write_documents):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    (tmp_path / "mine").mkdir()
    load("bytes").save(tmp_path / "mine")
    make(corpus, tmp_path / "made", tokenizer=str(tmp_path / "mine"))
    shutil.rmtree(tmp_path / "mine")
    assert make(corpus, tmp_path / "made", tokenizer=str(tmp_path / "mine")).was_there


def test_a_folder_that_is_not_a_dataset_is_never_replaced(
    tmp_path, make, write_documents, contents
):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    mine = write_documents(tmp_path / "mine", ["my letters"])
    for force in (False, True):
        with pytest.raises(DataError, match="exists and is not a dataset; choose another folder"):
            make(corpus, mine, force=force)
    assert contents(mine) == {"00000.txt": b"my letters"}


# --- failures ------------------------------------------------------------------------------------


def test_a_failure_midway_leaves_the_old_dataset_unchanged(
    tmp_path, monkeypatch, make, write_documents, contents
):
    monkeypatch.setattr(pipeline, "TASK_BYTES", 50)
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    make(corpus, tmp_path / "data/made")
    before = contents(tmp_path / "data/made")
    (corpus / "zzz.jsonl").write_text('{"text": "good"}\n{"text": \n')
    for out in ("made", "fresh"):
        with pytest.raises(DataError, match=r"zzz\.jsonl:2: not a JSON line"):
            make(corpus, tmp_path / "data" / out, force=True)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["made"]
    assert contents(tmp_path / "data/made") == before


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.txt": b"", "b.txt": b""}, "no text in its 2 files"),
        (
            {"a.bin": b"\xff\x00", "b.bin": b"\xfe"},
            r"no UTF-8 text in its 2 files \(corpus/a\.bin the first\)",
        ),
        ({"a.jsonl": b"\n\n"}, "no text in its 1 file;"),
        ({"a.txt": b"%PDF-1.7"}, r"no text in its 1 file \(corpus/a\.txt: PDF document, left out"),
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_corpus_without_text_is_refused(tmp_path, files, said, kind, make):
    (tmp_path / "corpus").mkdir()
    for name, data in files.items():
        (tmp_path / "corpus" / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        make(tmp_path / "corpus", tmp_path / "made", tokenizer=kind)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_files_that_are_not_text_are_skipped_and_reported(
    tmp_path, make, write_documents, read_back
):
    corpus = write_documents(tmp_path / "corpus", ["a text", "another"])
    (corpus / "picture").write_bytes(b"\x89PNG")
    (corpus / "latin-1.txt").write_bytes(b"caf\xe9")
    result = make(corpus, tmp_path / "made", val_fraction=0)
    remarked = {
        "not UTF-8, left out": ["corpus/latin-1.txt"],
        "PNG image, left out": ["corpus/picture"],
    }
    assert result.remarked == remarked
    assert result.manifest.remarks == dict.fromkeys(remarked, 1)
    assert len(read_back(tmp_path / "made", "train")) == 2


def test_an_output_folder_that_cannot_be_created_is_refused(tmp_path, make, write_documents):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"file/made: can't be made .*; choose another folder"):
        make(corpus, tmp_path / "file/made")


def test_a_vocabulary_size_without_bpe_is_refused(tmp_path, make, write_documents):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    with pytest.raises(ConfigError, match="--vocab-size: 300 goes with --tokenizer bpe"):
        make(corpus, tmp_path / "made", vocab_size=300)


# --- the demo ------------------------------------------------------------------------------------


def test_the_demo_dataset_is_the_source_of_the_standard_library(tmp_path, monkeypatch, read_back):
    library = tmp_path / "python"
    for name in ("os.py", "json/decoder.py", "site-packages/torch/nn.py", "__pycache__/os.py",
                 "lib2to3/notes.txt"):  # fmt: skip
        path = library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\nprint({name!r})\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.chdir(tmp_path)
    result = tokenize(demo_request(), lambda *_: None)
    train, val = (read_back(Path("data/demo"), split) for split in ("train", "val"))
    tokenizer = open_dataset(Path("data/demo")).tokenizer
    text = tokenizer.decode([token for ids in train + val for token in ids])
    assert text == "# os.py\nprint('os.py')\n# json/decoder.py\nprint('json/decoder.py')\n"
    assert result.manifest.options["vocab_size"] == 4096


def test_the_demo_corpus_has_more_than_10_megabytes():
    request = demo_request()
    paths = [Path(path) for path in request.paths]
    assert not [path for path in paths if "packages" in path.name]
    files = [file for path in paths
             for file in ([path] if path.is_file() else path.rglob("*.py"))]  # fmt: skip
    assert sum(file.stat().st_size for file in files) > 10_000_000


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_memory_does_not_grow_with_the_length_of_a_document(tmp_path, start, ending):
    """Compares the peak physical memory of all processes for one line of 20 MB and one of 100 MB.
    Holding the line in memory even once would take 80 MB more."""
    peaks = []
    for megabytes in (20, 100):
        words = b"words and more words, " * (megabytes * 10**6 // 22)
        data = gzip.compress(words, compresslevel=1) if ending.endswith("gz") else words
        (tmp_path / f"long{ending}").write_bytes(data)
        arguments = ["tokenize", f"long{ending}", "--tokenizer", "bytes", "--workers", "2",
                     "--val-fraction", "0", "--out", "made", "--force"]  # fmt: skip
        with start(
            arguments, tmp_path, {"pretrain_cli.data.tokenizing.pipeline.SMALL": 0}
        ) as process:
            peaks.append(peak_memory(process))
        assert process.returncode == 0
    assert peaks[1] - peaks[0] < 60e6, peaks


def peak_memory(process):
    """Return the sum of the peak physical memory of a process and its children, in bytes."""
    most = Counter()
    while process.poll() is None:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for number in (process.pid, *children):
                status = Path(f"/proc/{number}/status").read_text()
                if kilobytes := re.search(r"VmHWM:\s+(\d+)", status):
                    most[int(number)] = int(kilobytes[1]) * 1024
        except (FileNotFoundError, ProcessLookupError):
            pass  # the process has ended
        time.sleep(0.02)
    return most.total()
