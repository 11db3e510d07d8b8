"""Files for llm.c and modded-nanogpt: a header of 256 words, then documents."""

import struct

import numpy as np
import pytest

from pretrain_cli.errors import ConfigError

TEXTS = [f"text {number}, {'äöü ' * number}" for number in range(60)]


def parsed(path):
    """Return (magic, version, token count, values in the rest of the header, tokens) of a file."""
    data = path.read_bytes()
    words = struct.unpack("<256i", data[:1024])
    return (*words[:3], set(words[3:]), np.frombuffer(data[1024:], "<u2").tolist())


def joined(folder, split):
    """Return the tokens of all files of a split, and check their headers."""
    found = []
    for path in sorted(folder.glob(f"*_{split}_*.bin")):
        magic, version, count, rest, tokens = parsed(path)
        assert (magic, version, rest) == (20240520, 1, {0})
        assert count == len(tokens)
        found += tokens
    return found


def test_a_separator_precedes_each_document(tmp_path, make, write_documents, read_back):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    made = tmp_path / "made"
    make(corpus, made, format="llm.c", val_fraction=0.3, shard_tokens=1024)
    names = [path.name for path in sorted((made / "llm.c").iterdir())]
    trains = len(list(made.glob("train-*.bin")))
    vals = len(list(made.glob("val-*.bin")))
    assert min(trains, vals) > 1
    assert names == [
        *(f"made_train_{number:06d}.bin" for number in range(1, trains + 1)),
        *(f"made_val_{number:06d}.bin" for number in range(1, vals + 1)),
    ]
    for split in ("train", "val"):
        ours = [token for ids in read_back(made, split) for token in ids]
        assert joined(made / "llm.c", split) == [256, *ours]  # `ours` ends with 256 too


def test_only_the_first_file_of_a_split_has_an_extra_token(tmp_path, make, write_documents):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    make(corpus, tmp_path / "made", format="llm.c", val_fraction=0, shard_tokens=1024)
    counts = [parsed(path)[2] for path in sorted((tmp_path / "made/llm.c").iterdir())]
    assert counts[0] == 1025
    assert set(counts[1:-1]) == {1024}
    assert 0 < counts[-1] <= 1024


def test_a_tokenizer_with_a_bos_token_gets_no_extra_separator(tmp_path, make, load, read_back):
    load("llama2")  # skips without its file
    (tmp_path / "a.txt").write_text("Hello world")
    make(tmp_path / "a.txt", tmp_path / "made", tokenizer="llama2", format="llm.c", val_fraction=0)
    (ids,) = read_back(tmp_path / "made", "train")
    assert joined(tmp_path / "made/llm.c", "train") == ids == [1, 15043, 3186, 2]


def test_appended_documents_are_in_the_llm_c_files(tmp_path, make, write_documents, read_back):
    corpus = write_documents(tmp_path / "corpus/old", TEXTS[:30]).parent
    made = tmp_path / "made"
    make(corpus, made, format="llm.c", val_fraction=0.3)
    write_documents(corpus / "new", TEXTS[30:])
    make(corpus, made, format="llm.c", val_fraction=0.3, append=True)
    for split in ("train", "val"):
        ours = [token for ids in read_back(made, split) for token in ids]
        assert joined(made / "llm.c", split) == [256, *ours]


def test_a_vocabulary_too_large_for_16_bits_is_refused(tmp_path, make, load):
    load("qwen3")  # skips without its file
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError) as error:
        make(tmp_path / "a.txt", tmp_path / "made", tokenizer="qwen3", format="llm.c")
    assert str(error.value) == (
        "--format llm.c: holds ids below 65,536, and qwen3 has 151,669; leave it out, or choose "
        "another tokenizer"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
