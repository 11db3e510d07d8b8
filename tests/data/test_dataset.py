"""Opening a dataset returns the tokens as written and detects later changes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pretrain_cli.data import dataset as module
from pretrain_cli.data import mapped_files
from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.errors import DataError

DOCUMENTS = [b"first", b"the second one", b"4", b"and the last, long"]
TOKENS = [token for document in DOCUMENTS for token in (*document, 256)]


@pytest.fixture
def dataset(tmp_path, write):
    """Folder of a dataset with five training shards and two validation shards."""
    write(tmp_path / "made", DOCUMENTS, [b"for validation"])
    return tmp_path / "made"


def refusal(folder):
    with pytest.raises(DataError) as error:
        open_dataset(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_tokens_are_read_across_shard_borders(dataset):
    row = open_dataset(dataset).train.tokens
    assert len(row) == len(TOKENS)
    for start in range(len(TOKENS)):
        for count in (0, 1, 2, 20, len(TOKENS)):
            assert row.read(start, count).tolist() == TOKENS[start : start + count]


def test_document_starts_are_found_across_shard_borders(dataset):
    opened = open_dataset(dataset)
    assert opened.train.documents.between(0, 99).tolist() == [0, 6, 21, 23]
    assert opened.val.documents.between(0, 99).tolist() == [0]
    assert (len(opened.train.documents), len(opened.val.documents)) == (4, 1)


def test_an_opened_dataset_has_its_tokenizer_and_text_sizes(dataset, load):
    opened = open_dataset(dataset)
    assert opened.tokenizer.fingerprint == load("bytes").fingerprint
    assert opened.largest_token == 256
    assert (opened.train.bytes, opened.val.bytes) == (sum(map(len, DOCUMENTS)), 14)
    assert opened.unverified_bytes == 0


def test_a_split_without_documents_is_empty(tmp_path, write):
    write(tmp_path / "made", held_out=[])
    val = open_dataset(tmp_path / "made").val
    assert len(val.tokens) == len(val.documents) == val.bytes == 0
    assert val.tokens.read(0, 5).tolist() == val.documents.between(0, 9).tolist() == []


# --- many shards ---------------------------------------------------------------------------------


def multiply(folder, count):
    """Make the first training shard of a dataset `count` shards, by hard links."""
    content = json.loads((folder / "dataset.json").read_text())
    first, *_ = content["shards"]
    content["shards"] = [first | {"file": f"train-{number:05d}.bin"} for number in range(count)] + [
        shard for shard in content["shards"] if shard["split"] == "val"
    ]
    for key in ("tokens", "documents"):
        content["splits"]["train"][key] = first[key] * count
    for ending in ("bin", "idx", "crc"):
        data = (folder / f"train-00000.{ending}").read_bytes()
        for number in range(count):
            path = folder / f"train-{number:05d}.{ending}"
            if number % 1000:  # file systems limit the links of a file
                path.unlink(missing_ok=True)
                path.hardlink_to(folder / f"train-{number // 1000 * 1000:05d}.{ending}")
            else:
                path.write_bytes(data)
    (folder / "dataset.json").write_text(json.dumps(content, indent=2))
    return (*b"first", 256, *b"the ")


def test_many_shards_are_read_through_few_maps(dataset, monkeypatch):
    monkeypatch.setattr(mapped_files, "MAPPED_AT_MOST", 3)
    shard = multiply(dataset, 40)
    before = len(os.listdir("/dev/fd"))
    opened = open_dataset(dataset)
    assert opened.unverified_bytes == 0
    for start in np.random.default_rng(0).permutation(400).tolist():
        expected = (shard * 42)[start : min(start + 17, 400)]
        assert opened.train.tokens.read(start, 17).tolist() == list(expected)
        assert len(os.listdir("/dev/fd")) <= before + 3
    starts = [number * 10 + at for number in range(40) for at in (0, 6)]
    assert opened.train.documents.between(0, 400).tolist() == starts
    assert len(opened.train.documents) == 80
    assert len(list(opened.train.iter_documents())) == 80


def test_of_too_many_shards_the_sizes_are_checked(dataset, monkeypatch):
    monkeypatch.setattr(module, "SHARDS_VERIFIED", 3)
    monkeypatch.setattr(mapped_files, "MAPPED_AT_MOST", 1)
    assert open_dataset(dataset).unverified_bytes == (len(TOKENS) + 15) * 2
    os.truncate(dataset / "train-00002.idx", 1)
    opened = open_dataset(dataset)
    with pytest.raises(DataError, match=r"train-00002\.idx: not the file that was there"):
        opened.train.documents.between(0, 99)
    (dataset / "train-00002.bin").write_bytes(bytes(18))
    assert refusal(dataset) == (
        f"{dataset / 'train-00002.bin'}: 18 bytes where dataset.json says 20; tokenize again with "
        "--force"
    )
    (dataset / "train-00002.bin").unlink()
    assert refusal(dataset).startswith(f"{dataset / 'train-00002.bin'}: missing")


OPEN = """
import resource, sys, time
from pathlib import Path
from pretrain_cli.data.dataset import open_dataset

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before, began = memory(), time.process_time()
opened = open_dataset(Path(sys.argv[1]))
print(time.process_time() - began, memory() - before, len(opened.train.tokens))
"""


@pytest.mark.slow
def test_a_hundred_thousand_shards_open_in_two_seconds(dataset):
    """Seconds of CPU time, since other processes may be running. The manifest has 40 MB."""
    multiply(dataset, 100_000)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, dataset], capture_output=True, text=True, check=True
    )
    seconds, kilobytes, tokens = map(float, done.stdout.split())
    assert tokens == 10**6
    assert seconds < 2
    assert kilobytes < 400_000


# --- changes after writing -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["train-00002.bin", "train-00002.idx", "train-00002.crc", "val-00000.bin"]
)
@pytest.mark.parametrize("position", [0, -1])
def test_one_flipped_bit_is_detected(dataset, name, position):
    data = bytearray((dataset / name).read_bytes())
    data[position] ^= 1
    (dataset / name).write_bytes(data)
    message = refusal(dataset)
    said = "damaged between bytes 0 and " if name.endswith("bin") else "checksum differs from dat"
    assert message.startswith(f"{dataset / name}: {said}")
    assert "tokenize again" in message


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00000.idx", "val-00000.bin"])
@pytest.mark.parametrize("change", [-8, -1, 8])
def test_a_truncated_or_extended_file_is_detected(dataset, name, change):
    data = (dataset / name).read_bytes()
    size = len(data)
    (dataset / name).write_bytes((data + bytes(8))[: size + change])
    message = refusal(dataset)
    assert message.startswith(f"{dataset / name}: {size + change} bytes")
    assert f"says {size}" in message
    assert "tokenize again" in message


def test_a_large_dataset_is_checked_by_file_size_only(dataset, monkeypatch):
    monkeypatch.setattr(module, "VERIFIED_WHEN_OPENED", 10)
    opened = open_dataset(dataset)
    assert opened.unverified_bytes == sum(path.stat().st_size for path in dataset.glob("*.bin"))
    with (dataset / "train-00000.bin").open("ab") as file:
        file.write(b"xx")
    assert "train-00000.bin" in refusal(dataset)


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "val-00000.idx", "val-00001.crc", "tokenizer.json", "files.jsonl"]
)
def test_the_error_names_a_missing_file(dataset, name):
    (dataset / name).unlink()
    assert refusal(dataset).startswith(f"{dataset / name}: ")


def test_a_replaced_tokenizer_is_detected(dataset, load):
    load("bpe").save(dataset)
    message = refusal(dataset)
    assert "not the tokenizer that made this dataset (bytes)" in message
    assert "tokenize again" in message


def test_a_folder_that_is_not_a_dataset_is_refused(tmp_path):
    assert "pretrain tokenize" in refusal(tmp_path)
    assert "no such dataset" in refusal(tmp_path / "nowhere")
