"""From a corpus to a dataset: every document, once, on the right side, or nothing at all."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from pretrain_cli.data import tokenize as module
from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.data.tokenize import TokenizeRequest, demo_request, tokenize
from pretrain_cli.errors import ConfigError, DataError


def make(corpus, out, **options):
    """Tokenize, in bytes where nothing else is asked for."""
    paths = (corpus,) if isinstance(corpus, Path) else tuple(corpus)
    options = {"tokenizer": "bytes"} | options
    return tokenize(TokenizeRequest(paths=paths, out=out, **options), lambda *_: None)


def write_documents(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:05d}.txt").write_bytes(text.encode())
    return folder


def read_back(folder, split):
    """The split's documents, as the ids between the starts in the index; without our reader."""
    manifest = json.loads((folder / "dataset.json").read_text())
    out = []
    for shard in manifest["shards"]:
        if shard["split"] == split:
            path = folder / shard["file"]
            tokens = np.fromfile(path, dtype={"uint16": "<u2", "uint32": "<u4"}[manifest["dtype"]])
            starts = np.fromfile(path.with_suffix(".idx"), dtype="<u8").astype(int)
            assert starts[0] == 0
            out += [ids.tolist() for ids in np.split(tokens, starts[1:])]
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


TEXTS = [f"Document {number}: äöü, {'words ' * (number % 7)}\n" for number in range(40)]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2", "gemma3", "llama2"])
def test_every_document_is_as_the_library_encodes_it(load, tmp_path, kind):
    if kind != "bpe":
        load(kind)  # or skip
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
    assert manifest.total("train", "bytes") + manifest.total("val", "bytes") == sizes
    assert manifest.total("train", "tokens") == sum(map(len, train))
    assert manifest.total("val", "documents") == len(val)


def test_a_corpus_larger_than_a_batch_keeps_its_order(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 100)
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    make(corpus, tmp_path / "made", val_fraction=0)
    assert read_back(tmp_path / "made", "train") == [[*text.encode(), 256] for text in TEXTS]
    assert read_back(tmp_path / "made", "val") == []


# --- held out for validation ---------------------------------------------------------------------


def test_what_is_held_out_stays_so_when_the_corpus_grows(tmp_path):
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
    assert 30 < len(large["val"]) < 95  # of 600, a tenth within four standard deviations


def test_a_larger_fraction_holds_out_more_and_never_less(tmp_path):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    held_out = []
    for number, fraction in enumerate((0.1, 0.3, 0.6)):
        make(corpus, tmp_path / f"made-{number}", val_fraction=fraction)
        held_out.append({tuple(ids) for ids in read_back(tmp_path / f"made-{number}", "val")})
    assert held_out[0] < held_out[1] < held_out[2]


@pytest.mark.parametrize("held_out_by_hash", [False, True])
def test_one_document_gives_its_last_tokens(tmp_path, monkeypatch, held_out_by_hash):
    """Whichever side its hash would put it on: neither may be empty."""
    monkeypatch.setattr(module, "_is_held_out", lambda text, fraction: held_out_by_hash)
    text = "".join(chr(97 + number % 26) for number in range(999))
    (tmp_path / "book.txt").write_text(text)
    result = make(tmp_path / "book.txt", tmp_path / "made", val_fraction=0.1)
    (train,), (val,) = (read_back(tmp_path / "made", split) for split in ("train", "val"))
    assert train + val == [*text.encode(), 256]
    assert len(val) == 100  # a tenth of 1000 tokens
    assert result.manifest.total("train", "bytes") == 900
    assert result.manifest.total("val", "bytes") == 99
    open_dataset(tmp_path / "made")


def test_whole_documents_at_the_end_are_held_out_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_is_held_out", lambda text, fraction: False)
    texts = ["a" * 49] * 6  # 50 tokens each
    make(write_documents(tmp_path / "corpus", texts), tmp_path / "made", val_fraction=0.5)
    assert list(map(len, read_back(tmp_path / "made", "train"))) == [50, 50, 50]
    assert list(map(len, read_back(tmp_path / "made", "val"))) == [50, 50, 50]


def test_a_cut_inside_a_character_loses_no_byte(tmp_path):
    text = "é" * 500
    (tmp_path / "book.txt").write_text(text)
    for fraction in (0.1, 0.101):
        result = make(tmp_path / "book.txt", tmp_path / "made", val_fraction=fraction, force=True)
        (train,), (val,) = (read_back(tmp_path / "made", split) for split in ("train", "val"))
        assert bytes(train + val[:-1]).decode() == text
        total = sum(result.manifest.total(split, "bytes") for split in ("train", "val"))
        assert total == 1000


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_a_fraction_must_leave_something_to_train_on(tmp_path, fraction):
    with pytest.raises(ConfigError, match=f"--val-fraction: {fraction} is not from 0 up to 1"):
        make(tmp_path, tmp_path / "made", val_fraction=fraction)


# --- again ---------------------------------------------------------------------------------------


def test_the_same_request_of_the_same_files_does_nothing(tmp_path, monkeypatch):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    first = make(corpus, tmp_path / "made")
    before = (tmp_path / "made/dataset.json").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    for path in (corpus, Path("corpus")):  # however the path is written
        again = make(path, tmp_path / "made")
        assert again.was_there
        assert not first.was_there
        assert again.manifest == first.manifest
        assert (tmp_path / "made/dataset.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokenizer": "bpe"}, "tokenizer"),
        ({"val_fraction": 0.2}, "val_fraction"),
        ({"corpus": "other"}, "corpus"),
    ],
)
def test_another_request_does_not_replace_a_dataset_unasked(tmp_path, change, what):
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


def test_another_tokenizer_in_the_same_file_is_another_request(load, tmp_path):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    (tmp_path / "mine").mkdir()
    load("bytes").save(tmp_path / "mine")
    make(corpus, tmp_path / "made", tokenizer=str(tmp_path / "mine"))
    assert make(corpus, tmp_path / "made", tokenizer=str(tmp_path / "mine")).was_there
    load("bpe").save(tmp_path / "mine")
    with pytest.raises(DataError, match="made with another tokenizer; replace it with --force"):
        make(corpus, tmp_path / "made", tokenizer=str(tmp_path / "mine"))


def test_a_folder_that_is_no_dataset_is_never_replaced(tmp_path):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    mine = write_documents(tmp_path / "mine", ["my letters"])
    for force in (False, True):
        with pytest.raises(DataError, match="exists and is not a dataset; choose another folder"):
            make(corpus, mine, force=force)
    assert contents(mine) == {"00000.txt": b"my letters"}


# --- nothing half-written ------------------------------------------------------------------------


def test_a_corpus_that_breaks_midway_leaves_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 50)
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
        ({"a.bin": b"\xff\x00", "b.bin": b"\xfe"}, r"none of its 2 files is UTF-8 text \(a\.bin"),
        ({"a.jsonl": b"\n\n"}, "no text in its 1 files"),
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_corpus_without_text_is_refused(tmp_path, files, said, kind):
    (tmp_path / "corpus").mkdir()
    for name, data in files.items():
        (tmp_path / "corpus" / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        make(tmp_path / "corpus", tmp_path / "made", tokenizer=kind)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_what_is_not_utf8_is_skipped_and_given_back(tmp_path):
    corpus = write_documents(tmp_path / "corpus", ["a text", "another"])
    (corpus / "picture.png").write_bytes(b"\x89PNG")
    result = make(corpus, tmp_path / "made", val_fraction=0)
    assert result.skipped == [corpus / "picture.png"]
    assert len(read_back(tmp_path / "made", "train")) == 2


def test_a_place_that_cannot_be_made_is_refused(tmp_path):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"file/made: can't be made .*; choose another folder"):
        make(corpus, tmp_path / "file/made")


def test_a_vocabulary_size_goes_with_bpe_alone(tmp_path):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    with pytest.raises(ConfigError, match="--vocab-size: 300 goes with --tokenizer bpe"):
        make(corpus, tmp_path / "made", vocab_size=300)


# --- the demo ------------------------------------------------------------------------------------


def test_the_demo_is_made_of_the_standard_librarys_sources(tmp_path, monkeypatch):
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
    assert result.manifest.tokenizer == "bpe-4096"


def test_the_running_pythons_own_sources_make_tens_of_megabytes():
    request = demo_request()
    assert not [path for path in request.paths if "packages" in path.name]
    files = [file for path in request.paths
             for file in ([path] if path.is_file() else path.rglob("*.py"))]  # fmt: skip
    assert sum(file.stat().st_size for file in files) > 10_000_000
