"""Opening a dataset returns the tokens as written and detects later changes."""

import pytest

from pretrain_cli.data import dataset as module
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
