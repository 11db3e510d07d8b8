"""Dataset writer: shards of a fixed size, and saved progress to resume from."""

import errno
import hashlib
import json
import os
import shutil
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.corpus.source_files import Corpus, TextFile
from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.data.shards import read_manifest
from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer, read_tokenizer
from pretrain_cli.data.tokenizing import shard_writer
from pretrain_cli.data.tokenizing.blocks import BLOCK, Encoded, FileEnd
from pretrain_cli.data.tokenizing.progress import Encoding
from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.data.tokenizing.writer import DatasetWriter, find_earlier, move_into_place
from pretrain_cli.errors import DataError

DOCUMENTS = [b"first", b"the second one", "drittes – ü".encode(), b"4", b"and the fifth, long"]
HELD_OUT = [b"for validation", b"and this"]

ENCODING = Encoding(encoder="", why_not_gigatoken="", samples_compared=0, bytes_per_second=0)


def asked(folder, **options):
    options = {"val_fraction": 0, "shard_tokens": 10} | options
    return TokenizeRequest(paths=("corpus",), out=folder, tokenizer="bytes", **options)


def writer(folder, tokenizer=None, **options):
    request = asked(folder, **options)
    return DatasetWriter(request, Corpus([]), tokenizer or load_tokenizer("bytes"))


def add(writer, split, documents):
    for document in documents:
        writer.shards.add(split, np.array([*document, 256]), [0])
        writer.shards.splits[split].bytes += len(document)


def end_file(writer, name):
    """Append a file that has nothing but the documents added before."""
    writer.corpus.files.append(TextFile(name, name, "corpus"))
    no_blocks = Encoded(np.empty(0, "<u2"), np.empty(0, BLOCK), [(0, FileEnd("", {}))], 0, 0, False)
    writer.append(no_blocks)


def row(documents):
    return [token for document in documents for token in (*document, 256)]


# --- shards --------------------------------------------------------------------------------------


def test_shards_hold_concatenated_documents_in_little_endian(tmp_path, write):
    write(tmp_path / "made", shard_tokens=1000)
    for split, documents in (("train", DOCUMENTS), ("val", HELD_OUT)):
        tokens = np.fromfile(tmp_path / f"made/{split}-00000.bin", dtype="<u2").tolist()
        assert tokens == row(documents)


def test_the_index_holds_the_start_of_each_document(tmp_path, write):
    write(tmp_path / "made", training=[b"abc", b"de", b"f"], shard_tokens=1000)
    index = np.fromfile(tmp_path / "made/train-00000.idx", dtype="<u8")
    assert index.tolist() == [0, 4, 7]  # lengths include the end mark


def test_a_shard_has_a_fixed_size_and_may_end_inside_a_document(tmp_path, write):
    write(tmp_path / "made")
    made = tmp_path / "made"
    sizes = {path.name: path.stat().st_size // 2 for path in made.glob("*.bin")}
    assert sizes == {  # train documents have 6, 15, 15, 2 and 20 tokens; val 15 and 9
        **{f"train-0000{number}.bin": 10 for number in range(5)},
        "train-00005.bin": 8,
        **{"val-00000.bin": 10, "val-00001.bin": 10, "val-00002.bin": 4},
    }
    whole = np.concatenate([np.fromfile(path, "<u2") for path in sorted(made.glob("train*.bin"))])
    assert whole.tolist() == row(DOCUMENTS)


@given(data=st.data(), size=st.integers(1, 12))
def test_tokens_added_in_any_portions_are_written_unchanged(
    tmp_path_factory, read_back, data, size
):
    """A portion is a part of a document or several documents; shards are shorter or longer."""
    folder = tmp_path_factory.mktemp("portions")
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    tokens = np.arange(sum(lengths)) % 256
    begins = [0, *accumulate(lengths)][:-1]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)), max_size=6)) | {len(tokens)})
    with pytest.MonkeyPatch.context() as patch, writer(folder / "made", shard_tokens=size) as made:
        patch.setattr(os, "fsync", lambda file: None)  # fsync takes long
        made.begin()
        start = 0
        for end in cuts:
            made.shards.add(
                "train", tokens[start:end], [at - start for at in begins if start <= at < end]
            )
            start = end
        manifest = made.finish(ENCODING)
    documents = [
        tokens[begin : begin + length].tolist()
        for begin, length in zip(begins, lengths, strict=True)
    ]
    assert read_back(folder / "made", "train") == documents
    assert all(shard.tokens == size for shard in manifest.shards[:-1])
    amount = manifest.splits["train"]
    assert (amount.tokens, amount.documents) == (len(tokens), len(lengths))


def test_the_manifest_matches_the_files(tmp_path, write):
    write(tmp_path / "made")
    manifest = json.loads((tmp_path / "made/dataset.json").read_text())
    assert manifest["format_version"] == 2
    assert manifest["dtype"] == "uint16"
    assert manifest["vocab_size"] == 257
    assert manifest["end_of_document"] == 256
    assert manifest["beginning_of_document"] is None
    stored = hashlib.sha256((tmp_path / "made/tokenizer.json").read_bytes()).hexdigest()
    assert manifest["tokenizer_fingerprint"] == stored
    for split, documents in (("train", DOCUMENTS), ("val", HELD_OUT)):
        size = sum(map(len, documents))
        assert manifest["splits"][split] == {
            "files": 0, "documents": len(documents), "bytes": size,
            "tokens": size + len(documents),
        }  # fmt: skip
        shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        assert sum(shard["tokens"] for shard in shards) == size + len(documents)
        assert sum(shard["documents"] for shard in shards) == len(documents)


def test_checksums_match_the_files(tmp_path, write, read_back):
    """One shard has several blocks of 64 KiB, the last one not full."""
    long = hashlib.shake_128(b"seed").digest(100_000)
    write(tmp_path / "made", training=[*DOCUMENTS, long], shard_tokens=90_000)
    assert [bytes(ids[:-1]) for ids in read_back(tmp_path / "made", "train")] == [*DOCUMENTS, long]
    sizes = [path.stat().st_size for path in sorted((tmp_path / "made").glob("train*.crc"))]
    assert sizes == [3 * 4, 1 * 4]  # 180,000 and 20,108 bytes


@pytest.mark.parametrize(("ids", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_vocabulary_size_determines_the_token_width(tmp_path, ids, dtype):
    vocab = {"<eos>": 0} | {str(number): number for number in range(1, ids)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<eos>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path / "tokenizer.json", name="numbers")
    with writer(tmp_path / "made", tokenizer, shard_tokens=1000) as made:
        made.begin()
        made.shards.add("train", np.array([1, ids - 1, 0]), [0])
        manifest = made.finish(ENCODING)
    assert (manifest.dtype, manifest.largest_token) == (dtype, ids - 1)
    width = {"uint16": 2, "uint32": 4}[dtype]
    assert (tmp_path / "made/train-00000.bin").stat().st_size == 3 * width
    assert open_dataset(tmp_path / "made").train.tokens.read(0, 3).tolist() == [1, ids - 1, 0]


# --- validation split from the tail --------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("shard_tokens", [7, 10, 50, 1000])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9])
def test_the_tail_of_any_number_of_shards_is_held_out(
    tmp_path, read_back, split, shard_tokens, fraction
):
    """The documents are all in train, or all in val."""
    with writer(tmp_path / "made", shard_tokens=shard_tokens) as made:
        made.begin()
        add(made, split, DOCUMENTS)
        made.shards.hold_out_tail(fraction, load_tokenizer("bytes").decode)
        manifest = made.finish(ENCODING)
    whole = row(DOCUMENTS)
    train, val = (read_back(tmp_path / "made", name) for name in ("train", "val"))
    assert [token for ids in train + val for token in ids] == whole
    count = max(2, round(len(whole) * fraction))
    assert sum(map(len, val)) == count
    ends = [place + 1 for place, token in enumerate(whole) if token == 256]
    begins = {0, *ends, len(whole) - count} - {len(whole)}
    assert set(accumulate([0, *map(len, train + val)])) == begins | {len(whole)}
    for name, documents in (("train", train), ("val", val)):
        amount = manifest.splits[name]
        assert (amount.tokens, amount.documents) == (sum(map(len, documents)), len(documents))
    assert sum(amount.bytes for amount in manifest.splits.values()) == sum(map(len, DOCUMENTS))
    text = bytes(token for ids in val for token in ids if token < 256)
    assert manifest.splits["val"].bytes == len(text.decode(errors="replace").encode())
    opened = open_dataset(tmp_path / "made")
    assert opened.train.tokens.read(0, 1000).tolist() == whole[:-count]
    assert opened.val.tokens.read(0, 1000).tolist() == whole[-count:]


def test_a_tail_longer_than_one_block_is_held_out(tmp_path, monkeypatch, read_back):
    monkeypatch.setattr(shard_writer, "TAIL_BLOCK", 9)
    with writer(tmp_path / "made", shard_tokens=25) as made:
        made.begin()
        add(made, "val", DOCUMENTS)
        made.shards.hold_out_tail(0.7, load_tokenizer("bytes").decode)
        made.finish(ENCODING)
    train, val = (read_back(tmp_path / "made", name) for name in ("train", "val"))
    assert [token for ids in train + val for token in ids] == row(DOCUMENTS)
    assert sum(map(len, val)) == round(len(row(DOCUMENTS)) * 0.7)


# --- resuming ------------------------------------------------------------------------------------


def interrupted(folder, split="train", noted=3, lost=2):
    """Write `noted` documents, save the progress, and write `lost` more. Return the writer, still
    open, and the saved state."""
    made = writer(folder)
    made.__enter__()
    made.begin()
    add(made, split, DOCUMENTS[:noted])
    end_file(made, "kept")
    made.save_progress()
    written = made.blocks.file_began.written
    add(made, split, DOCUMENTS[noted : noted + lost])
    end_file(made, "lost")
    return made, written


def found(folder):
    """Return the saved progress as the next writer reads it."""
    return find_earlier(asked(folder)).saved


@pytest.mark.parametrize("noted", [1, 2, 3, 4])
def test_tokens_written_after_the_last_save_are_discarded(tmp_path, contents, noted):
    made, _ = interrupted(tmp_path / "made", noted=noted, lost=1)
    made.__exit__(KeyboardInterrupt, None, None)
    with writer(tmp_path / "made") as again:
        again.begin(found(tmp_path / "made"))
        add(again, "train", DOCUMENTS[noted:])
        add(again, "val", HELD_OUT)
        again.finish(ENCODING)
    with writer(tmp_path / "straight") as straight:
        straight.begin()
        add(straight, "train", DOCUMENTS)
        end_file(straight, "kept")
        add(straight, "val", HELD_OUT)
        straight.finish(ENCODING)
    assert contents(tmp_path / "made") == contents(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "straight"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_holding_out_the_tail_does_not_change_saved_files(tmp_path, split):
    """Otherwise a run interrupted in this step could not resume."""
    folder = tmp_path / "made"
    made, written = interrupted(folder, split, noted=len(DOCUMENTS), lost=0)
    noted = {shard.file for shard in made.shards.closed} | {e.file for e in written.open.values()}
    before = {name: (folder.with_name("made.partial") / name).read_bytes() for name in noted}
    made.shards.hold_out_tail(0.6, load_tokenizer("bytes").decode)
    made.__exit__(KeyboardInterrupt, None, None)
    for name, data in before.items():
        assert (folder.with_name("made.partial") / name).read_bytes()[: len(data)] == data, name
    with writer(folder) as again:
        again.begin(found(folder))
        again.shards.hold_out_tail(0.6, load_tokenizer("bytes").decode)
        again.finish(ENCODING)
    opened = open_dataset(folder)
    tokens = opened.train.tokens.read(0, 99).tolist() + opened.val.tokens.read(0, 99).tolist()
    assert tokens == row(DOCUMENTS)


def test_saved_progress_that_does_not_match_the_files_is_ignored(tmp_path):
    made, written = interrupted(tmp_path / "made")
    made.__exit__(KeyboardInterrupt, None, None)
    assert found(tmp_path / "made").here.written == written
    os.truncate(tmp_path / "made.partial" / written.open["train"].file, 2)
    assert found(tmp_path / "made") is None


def test_a_missing_or_invalid_progress_file_is_ignored(tmp_path):
    (tmp_path / "made.partial").mkdir()
    assert found(tmp_path / "made") is None
    (tmp_path / "made.partial/progress.json").write_text("{")
    assert found(tmp_path / "made") is None


# --- failures and replacement --------------------------------------------------------------------


def test_a_writer_that_fails_before_its_first_save_leaves_nothing(tmp_path):
    def fail():
        with writer(tmp_path / "made") as made:
            made.begin()
            made.shards.add("train", np.array([1, 2, 256]), [0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_raises_the_original_error(tmp_path, monkeypatch):
    """Closing the open files would fail again, which must not hide the first error."""
    real = Path.open

    def full(self, *given, **named):
        return real(Path("/dev/full") if self.name == "train-00000.bin" else self, *given, **named)

    def fill():
        with writer(tmp_path / "made", shard_tokens=1000) as made:
            made.begin()
            made.shards.add("train", np.arange(256), [0])
            made.save_progress()

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left") as error:
        fill()
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_the_staging_folder_of_a_killed_writer_is_replaced(tmp_path, write):
    left = tmp_path / "made.partial"
    (left / "llm.c").mkdir(parents=True)
    (left / "llm.c/made_train_000001.bin").write_bytes(b"half")
    (left / "train-00000.bin").write_bytes(b"half")
    write(tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert not (tmp_path / "made/llm.c").exists()
    open_dataset(tmp_path / "made")


def test_a_new_dataset_replaces_all_files_of_the_old_one(tmp_path, write):
    write(tmp_path / "made", shard_tokens=5)
    write(tmp_path / "made", training=[b"new"])
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in (tmp_path / "made").glob("train*.bin")] == ["train-00000.bin"]
    open_dataset(tmp_path / "made")


def test_replacing_a_dataset_does_not_change_neighbouring_folders(tmp_path, write):
    write(tmp_path / "made")
    beside = [tmp_path / "made.old", tmp_path / "made.new"]
    for copy in beside:
        shutil.copytree(tmp_path / "made", copy)
    write(tmp_path / "made", training=[b"new"])
    for copy in beside:
        assert open_dataset(copy).train.tokens.read(0, 9).tolist() == row(DOCUMENTS)[:9]
    assert not any(path.is_dir() for path in (tmp_path / "made").iterdir())


@pytest.mark.parametrize("renames", [0, 1])
def test_a_complete_staged_dataset_is_moved_into_place_after_a_kill(
    tmp_path, write, monkeypatch, renames
):
    """The kill comes before or after the old dataset is moved away."""
    write(tmp_path / "made", training=[b"old"])
    real = Path.rename

    def killed(self, target):
        nonlocal renames
        if self.name.startswith("made"):
            if not renames:
                raise KeyboardInterrupt
            renames -= 1
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "made", training=[b"new"])
    move_into_place(tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert open_dataset(tmp_path / "made").train.tokens.read(0, 9).tolist() == row([b"new"])


def test_a_second_writer_of_the_same_dataset_is_refused(tmp_path):
    with writer(tmp_path / "made") as one:
        one.begin()
        add(one, "train", DOCUMENTS)
        with pytest.raises(DataError) as error, writer(tmp_path / "made"):
            pass
        assert str(error.value) == (
            f"{tmp_path / 'made.partial'}: another process is writing it; wait for it, or choose "
            "another folder with --out"
        )
        one.finish(ENCODING)
    assert read_manifest(tmp_path / "made").total.documents == len(DOCUMENTS)


def test_the_progress_file_is_deleted_before_the_other_files(tmp_path, monkeypatch):
    """Otherwise a run killed in between would leave progress that refers to deleted files."""
    (tmp_path / "made.partial").mkdir()
    for name in ("files.jsonl", "progress.json", "seen.sqlite"):
        (tmp_path / "made.partial" / name).write_text("")
    gone = []
    unlink, iterdir = Path.unlink, Path.iterdir
    monkeypatch.setattr(Path, "unlink", lambda self, **how: (gone.append(self.name), unlink(self)))
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(iterdir(self))))
    with writer(tmp_path / "made") as made:
        made.begin()
    assert gone == ["progress.json", "files.jsonl", "seen.sqlite"]
