"""The dataset on disk: what is written is read back, and what was changed since is found."""

import hashlib
import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data import dataset as opening
from pretrain_cli.data import shards
from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.data.shards import DatasetWriter, read_manifest
from pretrain_cli.data.tokenizer import load_tokenizer, read_tokenizer
from pretrain_cli.errors import DataError

DOCUMENTS = [b"first", b"the second one", "drittes – ü".encode(), b"4", b"and the fifth, long"]
HELD_OUT = [b"for validation", b"and this"]


def write(folder, *, training=DOCUMENTS, held_out=HELD_OUT):
    """A dataset of these documents, in bytes."""
    with DatasetWriter(folder, load_tokenizer("bytes")) as writer:
        for split, documents in (("train", training), ("val", held_out)):
            for document in documents:
                writer.add(split, [*document, 256], len(document))
        return writer.finish({"paths": ["corpus"]})


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A dataset of three training shards and two for validation."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 10)
    write(tmp_path / "made")
    return tmp_path / "made"


# --- what is written -----------------------------------------------------------------------------


def test_tokens_are_little_endian_documents_in_a_row(tmp_path):
    write(tmp_path / "made")
    tokens = np.fromfile(tmp_path / "made/train-00000.bin", dtype="<u2").tolist()
    assert tokens == [token for document in DOCUMENTS for token in (*document, 256)]
    assert np.fromfile(tmp_path / "made/val-00000.bin", dtype="<u2").tolist() == [
        token for document in HELD_OUT for token in (*document, 256)
    ]


def test_the_index_says_where_each_document_begins(tmp_path):
    write(tmp_path / "made", training=[b"abc", b"de", b"f"])
    index = np.fromfile(tmp_path / "made/train-00000.idx", dtype="<u8")
    assert index.tolist() == [0, 4, 7]  # each with its end


def test_a_shard_is_closed_behind_the_document_that_fills_it(dataset):
    sizes = {path.name: path.stat().st_size // 2 for path in sorted(dataset.glob("*.bin"))}
    assert sizes == {
        "train-00000.bin": 6 + 15,
        "train-00001.bin": 15,
        "train-00002.bin": 2 + 20,
        "val-00000.bin": 15,
        "val-00001.bin": 9,
    }


def test_the_manifest_says_what_the_files_hold(dataset):
    manifest = json.loads((dataset / "dataset.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["dtype"] == "uint16"
    assert manifest["vocab_size"] == 257
    assert manifest["end_of_document"] == 256
    assert manifest["beginning_of_document"] is None
    stored = hashlib.sha256((dataset / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["tokenizer_fingerprint"] == stored
    for shard in manifest["shards"]:
        data = (dataset / shard["file"]).read_bytes()
        index = (dataset / shard["file"]).with_suffix(".idx").read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert shard["index_sha256"] == hashlib.sha256(index).hexdigest()
        assert shard["tokens"] * 2 == len(data)
        assert shard["documents"] * 8 == len(index)
        assert shard["largest_token"] == 256
        assert shard["bytes"] == shard["tokens"] - shard["documents"]  # a token a byte, and ends


def test_totals_add_up_over_the_shards(dataset):
    manifest = read_manifest(dataset)
    for split, documents in (("train", DOCUMENTS), ("val", HELD_OUT)):
        size = sum(map(len, documents))
        assert manifest.total(split, "documents") == len(documents)
        assert manifest.total(split, "bytes") == size
        assert manifest.total(split, "tokens") == size + len(documents)


@pytest.mark.parametrize(("ids", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_vocabulary_chooses_the_width_of_a_token(tmp_path, ids, dtype):
    vocab = {"<eos>": 0} | {str(number): number for number in range(1, ids)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<eos>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path / "tokenizer.json", name="numbers")
    with DatasetWriter(tmp_path / "made", tokenizer) as writer:
        writer.add("train", [1, ids - 1, 0], 9)
        manifest = writer.finish({})
    assert (manifest.dtype, manifest.largest_token) == (dtype, ids - 1)
    width = {"uint16": 2, "uint32": 4}[dtype]
    assert (tmp_path / "made/train-00000.bin").stat().st_size == 3 * width
    assert open_dataset(tmp_path / "made").train.tokens.read(0, 3).tolist() == [1, ids - 1, 0]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def fail():
        with DatasetWriter(tmp_path / "made", load_tokenizer("bytes")) as writer:
            writer.add("train", [1, 2, 256], 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_no_dataset_and_is_replaced(tmp_path):
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial/train-00000.bin").write_bytes(b"half")
    write(tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    open_dataset(tmp_path / "made")


def test_a_new_dataset_replaces_an_old_one_whole(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 5)
        write(tmp_path / "made")
    write(tmp_path / "made", training=[b"new"])
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in sorted((tmp_path / "made").glob("train*.bin"))] == [
        "train-00000.bin"
    ]
    open_dataset(tmp_path / "made")


# --- reading -------------------------------------------------------------------------------------


def test_tokens_are_read_across_the_borders_of_shards(dataset):
    tokens = [token for document in DOCUMENTS for token in (*document, 256)]
    row = open_dataset(dataset).train.tokens
    assert len(row) == len(tokens)
    for start in range(len(tokens)):
        for count in (0, 1, 2, 20, len(tokens)):
            assert row.read(start, count).tolist() == tokens[start : start + count]


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
def test_any_read_is_a_slice_of_the_whole(stream, sizes, data):
    ends = np.cumsum([0, *sizes])
    row = stream(*[range(a, b) for a, b in pairwise(ends)])
    start = data.draw(st.integers(0, len(row)))
    count = data.draw(st.integers(0, len(row) + 3))
    read = row.read(start, count)
    assert read.dtype == np.int64
    assert read.tolist() == list(range(len(row)))[start : start + count]


def test_a_split_without_documents_is_empty(tmp_path):
    write(tmp_path / "made", held_out=[])
    row = open_dataset(tmp_path / "made").val.tokens
    assert len(row) == 0
    assert row.read(0, 5).tolist() == []


def test_the_fingerprint_is_of_the_tokens_and_not_of_the_place(tmp_path):
    seen = {write(tmp_path / "made").fingerprint}
    shutil.move(tmp_path / "made", tmp_path / "moved")
    assert open_dataset(tmp_path / "moved").fingerprint in seen
    assert write(tmp_path / "made").fingerprint in seen
    for training in (DOCUMENTS[::-1], DOCUMENTS[:-1], [b"First", *DOCUMENTS[1:]]):
        seen.add(write(tmp_path / "made", training=training).fingerprint)
    assert len(seen) == 4


# --- what has happened to it since ---------------------------------------------------------------


def edit_manifest(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder):
    with pytest.raises(DataError) as error:
        open_dataset(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.idx", "val-00000.bin"])
@pytest.mark.parametrize("position", [0, -1])
def test_one_flipped_bit_is_found(dataset, name, position):
    data = bytearray((dataset / name).read_bytes())
    data[position] ^= 1
    (dataset / name).write_bytes(data)
    message = refusal(dataset)
    assert message.startswith(f"{dataset / name}: checksum differs from dataset.json")
    assert "tokenize again" in message


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.idx", "val-00000.bin"])
@pytest.mark.parametrize("change", [-8, -1, 8])
def test_a_file_that_is_cut_short_or_longer_is_found(dataset, name, change):
    data = (dataset / name).read_bytes()
    size = len(data)
    (dataset / name).write_bytes((data + bytes(8))[: size + change])
    message = refusal(dataset)
    assert message.startswith(f"{dataset / name}: {size + change} bytes")
    assert f"says {size}" in message
    assert "tokenize again" in message


def test_sizes_are_checked_where_checksums_would_take_too_long(dataset, monkeypatch):
    monkeypatch.setattr(opening, "VERIFIED_WHEN_OPENED", 10)
    opened = open_dataset(dataset)
    assert opened.unverified_bytes == sum(
        path.stat().st_size for kind in ("bin", "idx") for path in dataset.glob(f"*.{kind}")
    )
    with (dataset / "train-00000.bin").open("ab") as file:
        file.write(b"xx")
    assert "train-00000.bin" in refusal(dataset)


@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.idx", "tokenizer.json"])
def test_a_missing_file_is_named(dataset, name):
    (dataset / name).unlink()
    assert refusal(dataset).startswith(f"{dataset / name}: ")


def test_another_tokenizer_in_its_place_is_found(dataset, load):
    load("bpe").save(dataset)
    message = refusal(dataset)
    assert "not the tokenizer that made this dataset (bytes)" in message
    assert "tokenize again" in message


def test_a_newer_format_is_refused_and_not_misread(dataset):
    edit_manifest(dataset, format_version=2, added_in_2="something")
    message = refusal(dataset)
    assert "format version 2" in message
    assert "reads 1" in message


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}'])
def test_a_damaged_manifest_is_refused(dataset, content):
    (dataset / "dataset.json").write_text(content)
    assert refusal(dataset) == f"{dataset / 'dataset.json'}: damaged; tokenize again with --force"


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    assert "pretrain tokenize" in refusal(tmp_path)
    assert "no such dataset" in refusal(tmp_path / "nowhere")
