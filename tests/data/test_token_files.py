"""Token files of other programs: read as written, or refused with a reason."""

import shutil
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from pretrain_cli.data import dataset as datasets
from pretrain_cli.data import token_files
from pretrain_cli.data.batches import Batches, Windows, validation_batches
from pretrain_cli.data.opening import open_data
from pretrain_cli.data.token_files import open_foreign
from pretrain_cli.errors import ConfigError, DataError
from tests.data.conftest import encode_documents

END = 256  # end of a document in the tokenizer `bytes`


def write(path, tokens, *, magic=20240520, version=1, count=None):
    """Write a file in llm.c's format: 256 int32, then the tokens. `magic` None writes tokens
    only."""
    path.parent.mkdir(exist_ok=True)
    wide = magic == 20240801
    data = struct.pack(f"<{len(tokens)}{'I' if wide else 'H'}", *tokens)
    if magic is not None:
        count = len(tokens) if count is None else count
        data = struct.pack("<256i", magic, version, count, *[0] * 253) + data
    path.write_bytes(data)
    return path


def numbers(path, size):
    """Write a tokenizer with this many ids, BOS 1 and EOS 0, and return its path."""
    vocab = {"<eos>": 0, "<bos>": 1} | {str(number): number for number in range(2, size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<eos>"))
    backend.add_special_tokens(["<eos>", "<bos>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    backend.save(str(path))
    return str(path)


def all_of(split):
    return split.tokens.read(0, len(split.tokens)).tolist()


def refusal(path, tokenizer="bytes", kind=DataError):
    with pytest.raises(kind) as error:
        open_data(str(path), tokenizer)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def small_blocks(monkeypatch):
    """Read files 8 tokens at a time, and treat them as too large to read or decode completely."""
    monkeypatch.setattr(token_files, "TOKENS_PER_READ", 16)
    monkeypatch.setattr(token_files, "VERIFIED_WHEN_OPENED", 0)
    monkeypatch.setattr(token_files, "SAMPLED", 200)
    monkeypatch.setattr(datasets, "DECODED", 8)
    monkeypatch.setattr(datasets, "DECODED_AT_ONCE", 8)


# --- the tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [{}, {"magic": 20240801, "version": 7}, {"magic": None}], ids=["16", "32", "bare"]
)
def test_tokens_are_read_as_they_were_written(tmp_path, header):
    tokens = np.random.default_rng(0).integers(0, 257, 1000).tolist()
    write(tmp_path / "x_train.bin", tokens, **header)
    write(tmp_path / "x_val.bin", tokens[:50], **header)
    opened = open_foreign(str(tmp_path / "x_train.bin"), "bytes")
    assert all_of(opened.train) == tokens
    assert all_of(opened.val) == tokens[:50]
    assert opened.largest_token == max(tokens)
    assert opened.unverified_bytes == 0
    assert opened.tokenizer.name == "bytes"


def test_files_of_a_pattern_are_concatenated_in_order_of_their_names(tmp_path):
    tokens = list(range(100))
    ends = [0, 13, 14, 50, 100]
    for number, (first, last) in reversed(list(enumerate(pairwise(ends)))):
        write(tmp_path / f"x_train_{number:06d}.bin", tokens[first:last])
    write(tmp_path / "x_val_000000.bin", [7, 8, 9])
    row = open_foreign(str(tmp_path / "x_train_*.bin"), "bytes").train.tokens
    for start in range(100):
        for count in (1, 2, 40, 200):
            assert row.read(start, count).tolist() == tokens[start : start + count]


def test_batches_read_windows_across_token_files(tmp_path):
    write(tmp_path / "x_train_1.bin", range(0, 35))
    write(tmp_path / "x_train_2.bin", range(35, 101))
    opened = open_foreign(str(tmp_path / "x_train_*.bin"), "bytes")
    windows = Windows(opened.train.tokens, seq_len=7, fingerprint="made", separator=END)
    batch = Batches([windows], [1], seq_len=7, samples_per_step=14, seed=0).starting_at(0)
    assert sorted(batch.inputs.ravel().tolist()) == list(range(98))
    assert np.array_equal(batch.targets, batch.inputs + 1)


def test_bare_tokens_are_as_wide_as_the_vocabulary_needs(tmp_path):
    tokens = [2, 70_000, 0, 3, 65_536, 0]
    (tmp_path / "train.bin").write_bytes(struct.pack("<6I", *tokens))
    (tmp_path / "val.bin").write_bytes(struct.pack("<2I", 5, 0))
    opened = open_foreign(str(tmp_path), numbers(tmp_path / "tokenizer.json", 70_001))
    assert all_of(opened.train) == tokens
    assert "bare 32-bit tokens" in opened.notices[0]


# --- training and validation ---------------------------------------------------------------------


NAMES = [
    "x_train_000001", "x_train_000002", "x_val_000000", "train", "val", "constrained-valley", "a_1",
    "a_2", "a-validation", "y10_train_1", "y10_val_1", "y10_val_2", "y100_val_1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "train", "val"),
    [
        ("x_train_*.bin", "x_train_000001 x_train_000002", "x_val_000000"),
        ("x_train_000002.bin", "x_train_000002", "x_val_000000"),
        ("x_train_00000[1-9].bin", "x_train_000001 x_train_000002", "x_val_000000"),
        ("x_*.bin", "x_train_000001 x_train_000002", "x_val_000000"),
        ("x_*_00000[02].bin", "x_train_000002", "x_val_000000"),
        ("train.bin", "train", "val"),
        ("constrained-valley.bin", "constrained-valley", ""),
        ("val.bin", "val", ""),
        ("a*.bin", "a_1 a_2", "a-validation"),
        ("y10_train_1.bin", "y10_train_1", "y10_val_1"),
        ("", "train x_train_000001 x_train_000002 y10_train_1",
         "a-validation val x_val_000000 y100_val_1 y10_val_1 y10_val_2"),
    ],
)  # fmt: skip
def test_training_and_validation_files_are_chosen_by_name(tmp_path, given, train, val):
    place = tmp_path / "with [brackets]" if "*" not in given and "[" not in given else tmp_path
    for number, name in enumerate(NAMES):
        write(place / f"{name}.bin", [number] * 8)
    opened = open_foreign(str(place / given), "bytes")
    found = [NAMES[number] for number in dict.fromkeys(all_of(opened.train))]
    assert " ".join(found) == train
    if val:
        found = [NAMES[number] for number in dict.fromkeys(all_of(opened.val))]
        assert " ".join(found) == val
        assert f"validation on {'' if ' ' in val else val + '.bin'}" in opened.notices[0]
    else:
        assert set(all_of(opened.val)) == set(all_of(opened.train))
        assert "validation on the last 2 tokens, held out" in opened.notices[0]


def test_a_notice_names_the_files_left_out(tmp_path):
    for name in ("train", "val", "test"):
        write(tmp_path / f"{name}.bin", range(9))
    (said,) = open_foreign(str(tmp_path), "bytes").notices[1:]
    assert said == f"{tmp_path}: neither train nor val by name, left out: test.bin"


@pytest.mark.parametrize(("count", "held_out"), [(1000, 10), (100, 2), (5, 2), (9000, 50)])
def test_without_validation_files_the_last_tokens_are_held_out(
    tmp_path, monkeypatch, count, held_out
):
    monkeypatch.setattr(token_files, "HELD_OUT_AT_MOST", 50)
    tokens = np.random.default_rng(0).integers(0, 257, count).tolist()
    write(tmp_path / "x_1.bin", tokens[: count // 3])
    write(tmp_path / "x_2.bin", tokens[count // 3 :])
    opened = open_foreign(str(tmp_path / "x_*.bin"), "bytes")
    assert all_of(opened.train) == tokens[:-held_out]
    assert all_of(opened.val) == tokens[-held_out:]
    assert opened.train.tokens.read(count - held_out - 1, 9).tolist() == [tokens[-held_out - 1]]
    assert f"the last {held_out} tokens" in opened.notices[0]


# --- documents -----------------------------------------------------------------------------------


def test_documents_in_llm_c_files_begin_at_a_separator(tmp_path):
    write(tmp_path / "x.bin", [END, 1, 2, END, 3, END, 4, 5, 6, 7])
    opened = open_foreign(str(tmp_path / "x.bin"), "bytes")
    assert (opened.separator, opened.separator_leads) == (END, True)
    assert opened.train.documents.between(0, 8).tolist() == [0, 3, 5]
    assert opened.train.documents.between(1, 5).tolist() == [3]
    assert opened.train.documents.between(3, 4).tolist() == [3]
    assert opened.train.documents.between(5, 5).tolist() == []
    assert len(opened.train.documents) == 3


def test_documents_in_nanogpt_files_begin_after_a_separator(tmp_path):
    write(tmp_path / "x.bin", [1, 2, END, 3, END, 4, 5, END, 6, 7], magic=None)
    opened = open_foreign(str(tmp_path / "x.bin"), "bytes")
    assert (opened.separator, opened.separator_leads) == (END, False)
    assert opened.train.documents.between(0, 100).tolist() == [0, 3, 5]
    assert opened.train.documents.between(3, 5).tolist() == [3]
    assert opened.train.documents.between(4, 5).tolist() == []
    assert opened.val.documents.between(0, 2).tolist() == [0]


def test_documents_in_llama_3_files_begin_at_the_bos_token(tmp_path):
    write(tmp_path / "x.bin", [1, 5, 6, 1, 7, 8, 1, 9, 5], magic=20240801, version=7)
    tokenizer = numbers(tmp_path / "tokenizer.json", 10)
    opened = open_foreign(str(tmp_path / "x.bin"), tokenizer)
    assert opened.train.documents.between(0, 7).tolist() == [0, 3, 6]
    assert opened.separator == 1


@pytest.mark.parametrize("magic", [20240520, None])
def test_document_starts_do_not_depend_on_the_read_size(tmp_path, small_blocks, magic):
    tokens = np.random.default_rng(1).choice([END, 1, 2], 500).tolist()
    write(tmp_path / "train_1.bin", tokens[:77], magic=magic)
    write(tmp_path / "train_2.bin", tokens[77:], magic=magic)
    write(tmp_path / "val_1.bin", tokens, magic=magic)
    documents = open_foreign(str(tmp_path), "bytes").train.documents
    behind = int(magic is None)
    starts = {0} | {place + behind for place in range(500 - behind) if tokens[place] == END}
    assert documents.between(0, 500).tolist() == sorted(starts)
    assert len(documents) == len(starts)
    for first in range(0, 500, 7):
        found = documents.between(first, first + 9).tolist()
        assert found == sorted(starts & set(range(first, first + 9)))


# --- the bytes of the text -----------------------------------------------------------------------

TEXTS = ["Vier grüne Flaschen", "日本語の文", "  two  spaces\n\n", "hanging on the wall 🍾"]


@pytest.mark.parametrize("magic", [20240520, None])
@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
def test_text_bytes_are_counted_without_document_marks(tmp_path, load, name, magic):
    tokenizer = load(name)
    tokenizer.save(tmp_path)
    tokens = []
    for text in TEXTS:
        *ids, end = encode_documents(tokenizer, [text])[0]
        tokens += [end, *ids] if magic else [*ids, end]
    for split in ("train", "val"):
        write(tmp_path / f"{split}.bin", tokens, magic=magic)
    size = sum(len(text.encode()) for text in TEXTS)
    opened = open_foreign(str(tmp_path), str(tmp_path / "tokenizer.json"))
    assert (opened.train.bytes, opened.val.bytes) == (size, size)


def test_a_tokenizers_leading_space_does_not_count_as_text(tmp_path):
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<eos>": 0, "▁green": 1, "▁bottles": 2}, "<eos>")
    )
    backend.add_special_tokens(["<eos>"])
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    for split in ("train", "val"):
        write(tmp_path / f"{split}.bin", [1, 2, 0, 1, 0, 1, 2, 2, 0], magic=None)
    opened = open_foreign(str(tmp_path), str(tmp_path / "tokenizer.json"))
    assert opened.val.bytes == len("green bottles") + len("green") + len("green bottles bottles")


def test_text_bytes_of_a_long_split_are_estimated_from_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DECODED", 400)
    monkeypatch.setattr(datasets, "DECODED_AT_ONCE", 50)
    tokens = [END, *b"nineteen characters"] * 250
    write(tmp_path / "train.bin", tokens)
    write(tmp_path / "val.bin", tokens)
    assert open_foreign(str(tmp_path), "bytes").val.bytes == pytest.approx(19 * 250, rel=0.02)


# --- the fingerprint -----------------------------------------------------------------------------


def test_the_fingerprint_covers_the_training_tokens_not_the_path(tmp_path, load):
    def fingerprint(train, val=(1, 2, 3), tokenizer="bytes", folder="a", **header):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
        write(tmp_path / folder / "train.bin", train, **header)
        if val:
            write(tmp_path / folder / "val.bin", val, **header)
        return open_foreign(str(tmp_path / folder), tokenizer).fingerprint

    load("bpe").save(tmp_path)
    tokens = list(range(200))
    seen = {fingerprint(tokens)}
    seen.add(fingerprint(tokens, folder="b"))
    (tmp_path / "b/train.bin").rename(tmp_path / "b/train_7.bin")
    seen.add(open_foreign(str(tmp_path / "b/train_?.bin"), "bytes").fingerprint)
    assert len(seen) == 2  # no validation file matches the pattern
    seen = {fingerprint(tokens)}
    seen.add(fingerprint([*tokens[:-1], 9]))
    seen.add(fingerprint([9, *tokens[1:]]))
    seen.add(fingerprint(tokens[::-1]))
    seen.add(fingerprint(tokens[:-1]))
    seen.add(fingerprint([*tokens, 1, 2], val=(3,)))  # the same tokens, split elsewhere
    seen.add(fingerprint([*tokens, 1, 2, 3], val=()))
    seen.add(fingerprint(tokens, tokenizer=str(tmp_path / "tokenizer.json")))
    seen.add(fingerprint(tokens, magic=None))
    seen.add(fingerprint(tokens, magic=20240801, version=7))
    assert len(seen) == 10


def test_the_fingerprint_of_large_files_covers_evenly_spaced_blocks(tmp_path, small_blocks):
    tokens = [number % 256 for number in range(400)]  # 50 blocks of 16 bytes
    write(tmp_path / "val.bin", tokens[:20])  # 3 blocks, the last one of 4 tokens

    def opened(changed=None):
        changed = [] if changed is None else [changed]
        write(tmp_path / "train.bin", [99 if i in changed else t for i, t in enumerate(tokens)])
        return open_foreign(str(tmp_path), "bytes")

    # of 840 bytes about 200 are read: every fifth block and the last one
    assert opened().unverified_bytes == 840 - (10 + 1) * 16 - (16 + 8)
    assert opened().largest_token == 256  # unread blocks may hold any id
    same = opened().fingerprint
    assert opened(0).fingerprint != same
    assert opened(43).fingerprint != same
    assert opened(399).fingerprint != same
    assert opened(12).fingerprint == same


# --- ids that the tokenizer doesn't have ---------------------------------------------------------


def test_an_id_beyond_the_vocabulary_is_refused_at_opening(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DECODED", 8)
    monkeypatch.setattr(datasets, "DECODED_AT_ONCE", 8)
    write(tmp_path / "x_1.bin", range(50))
    write(tmp_path / "x_2.bin", [*range(50), 300, 1000, 5])
    assert refusal(tmp_path / "x_*.bin") == (
        f"{tmp_path / 'x_2.bin'}: token 50 is 300, beyond the 257 of the tokenizer; give the one "
        "that made the file with --tokenizer, or make the file again if it is damaged"
    )
    write(tmp_path / "y_train.bin", range(50))
    write(tmp_path / "y_val.bin", [257])
    assert refusal(tmp_path / "y_train.bin").startswith(f"{tmp_path / 'y_val.bin'}: token 0 is 257")


def test_an_id_beyond_the_vocabulary_is_refused_when_a_batch_reads_it(tmp_path, small_blocks):
    write(tmp_path / "x_train_1.bin", [1] * 100)
    write(tmp_path / "x_train_2.bin", [1] * 12 + [300] + [1] * 387)
    write(tmp_path / "x_val_0.bin", [1] * 12 + [400] + [1] * 387)
    opened = open_foreign(str(tmp_path / "x_train_*.bin"), "bytes")
    windows = Windows(opened.train.tokens, seq_len=20, fingerprint="made", separator=END)
    batches = Batches([windows], [1], seq_len=20, samples_per_step=1, seed=0)
    found = []
    for sample in range(len(windows)):
        try:
            batches.starting_at(sample)
        except DataError as error:
            found.append(str(error))
    (message,) = found
    assert message.startswith(f"{tmp_path / 'x_train_2.bin'}: token 12 is 300, beyond the 257 ")
    with pytest.raises(DataError, match=r"x_val_0\.bin: token 12 is 400"):
        list(validation_batches(opened.val.tokens, seq_len=20, batch_size=1))


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2 of llm.c's header, and 1 is the one that can be read"),
        ({"count": 101}, "1,224 bytes, and its header's 101 tokens take 1,226; the file is cut"),
        ({"count": 99}, "1,224 bytes, and its header's 99 tokens take 1,222; the file is cut"),
        ({"count": -1}, "1,224 bytes, and its header's -1 tokens take 1,022; the file is cut"),
        ({"magic": 20240801, "version": 1}, "version 1 of llm.c's header, and 7 is"),
        ({"magic": 20240326, "version": 3}, "begins as a model or another file"),
        ({"magic": 20240522}, "begins as a model or another file"),  # llm.c's evaluation data
        ({"magic": 0x04034B50}, "begins as a model or another file"),  # a zip file of PyTorch
    ],
)
def test_a_header_that_does_not_match_the_file_is_refused(tmp_path, change, said):
    path = write(tmp_path / "x_train.bin", range(100), **change)
    assert refusal(path).startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no tokens"),
        (struct.pack("<256i", 20240520, 1, *[0] * 254), "holds no tokens"),
        (struct.pack("<8i", 20240520, 1, 10, *[0] * 5), "32 bytes, and its header's 10 tokens"),
        (b"\0" * 101, "101 bytes are not a whole number of tokens; without llm.c's header it is "
         "taken for bare 16-bit tokens"),
    ],
)  # fmt: skip
def test_an_empty_or_cut_file_is_refused(tmp_path, data, said):
    (tmp_path / "x.bin").write_bytes(data)
    assert refusal(tmp_path / "x.bin").startswith(f"{tmp_path / 'x.bin'}: {said}")


def test_files_of_different_formats_are_refused(tmp_path):
    write(tmp_path / "x_1.bin", range(100))
    write(tmp_path / "x_2.bin", range(100), magic=None)
    assert refusal(tmp_path / "x_*.bin") == (
        f"{tmp_path / 'x_2.bin'}: bare 16-bit tokens, as nanoGPT writes them, and "
        f"{tmp_path / 'x_1.bin'} has 16-bit tokens behind llm.c's header; give files of one kind"
    )


def test_16_bit_tokens_are_refused_for_a_larger_vocabulary(tmp_path):
    path = write(tmp_path / "x.bin", range(100))
    message = refusal(path, numbers(tmp_path / "tokenizer.json", 70_000), ConfigError)
    assert "can't be those of" in message
    assert "which has 70,000; give the tokenizer that made them" in message


def test_paths_without_token_files_are_refused(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "folder.bin").mkdir()
    for name in ("x_*.bin", "[ab].bin"):
        assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: no file matches; give a ")
    assert "no such file; give a .bin file" in refusal(tmp_path / "x.bin")
    for name in ("text.txt", "*.txt"):
        message = refusal(tmp_path / name)
        assert message.startswith(f"{tmp_path / 'text.txt'}: not a .bin file of tokens")
        assert "pretrain tokenize" in message


def test_token_files_without_a_named_tokenizer_are_refused(tmp_path):
    path = write(tmp_path / "x.bin", range(100))
    for place in (path, tmp_path, tmp_path / "*.bin"):
        message = refusal(place, None, ConfigError)
        assert message.startswith(f"{place}: .bin files don't say which tokenizer made them")
        assert "--tokenizer" in message
    assert "tokenizer 'gpt3' is not one of" in refusal(path, "gpt3", ConfigError)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("fineweb_train_*.bin", "fineweb"),
        ("edu_fineweb_train_000001.bin", "edu-fineweb-000001"),
        ("TinyStories_train.bin", "TinyStories"),
        ("train.bin", "openwebtext"),
        (".", "openwebtext"),
    ],
)
def test_a_run_is_named_after_the_token_files(tmp_path, monkeypatch, given, name):
    folder = tmp_path / "openwebtext"
    write(folder / ("train.bin" if given == "." else given.replace("*", "000001")), range(9))
    monkeypatch.chdir(folder)
    assert open_foreign(given, "bytes").name == name
    assert open_foreign(given, "bytes").path == Path(given)
