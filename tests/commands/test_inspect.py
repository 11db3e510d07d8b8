"""`pretrain inspect`: shows a dataset's contents and finds damage."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pretrain_cli.commands.inspect import sparkline
from pretrain_cli.data.batches import Batches, Windows
from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.data.packing import open_packed

LINES = [f"line {number} of the corpus, {'x' * number}" for number in range(40)]


@pytest.fixture
def dataset(pretrain):
    """Dataset `data/mixed`: a folder and a .jsonl file, 40 documents in all, bytes as tokens."""
    Path("texts").mkdir()
    for number, line in enumerate(LINES[:10]):
        Path(f"texts/{number}.txt").write_text(line)
    Path("rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in LINES[10:]))
    done = pretrain(
        "tokenize texts rows.jsonl --tokenizer bytes --val-fraction 0.2 --out data/mixed"
    )
    assert done.code == 0, done.err
    return Path("data/mixed")


def inspected(pretrain, options=""):
    done = pretrain(f"inspect data/mixed --json {options}")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_totals_match_the_input_texts(pretrain, dataset):
    facts = inspected(pretrain)
    total = sum(map(len, LINES))
    splits = facts["splits"].values()
    assert sum(part["documents"] for part in splits) == len(LINES)
    assert sum(part["bytes"] for part in splits) == total
    assert sum(part["tokens"] for part in splits) == total + len(LINES)  # an end token each
    assert facts["bytes_per_token"] == pytest.approx(total / (total + len(LINES)))
    assert facts["end_of_document"] == 256
    assert facts["beginning_of_document"] is None
    assert (facts["beginning_token"], facts["end_token"]) == (None, "<|endoftext|>")


def test_document_boundary_tokens_are_shown_by_name(pretrain, dataset):
    assert ", documents end with <|endoftext|> (256), " in pretrain("inspect data/mixed").out
    line = "tokenize rows.jsonl --tokenizer data/mixed --bos '<|endoftext|>' --eos A --out marked"
    assert pretrain(line).code == 0
    out = pretrain("inspect marked").out
    assert ", documents between <|endoftext|> (256) and A (65), " in out


def test_sources_report_their_share_of_the_tokens(pretrain, dataset):
    sources = inspected(pretrain)["sources"]
    tokens = {"texts": LINES[:10], "rows.jsonl": LINES[10:]}
    tokens = {name: sum(len(line) + 1 for line in lines) for name, lines in tokens.items()}
    assert {name: part["tokens"] for name, part in sources.items()} == tokens
    shares = {name: part["share"] for name, part in sources.items()}
    assert shares == pytest.approx({n: t / sum(tokens.values()) for n, t in tokens.items()})


def test_lengths_are_counted_by_powers_of_two(pretrain, dataset):
    lengths = inspected(pretrain)["document_tokens"]
    counted = sum(sum(part["by_power"].values()) for part in lengths.values())
    assert counted == len(LINES)
    assert max(part["longest"] for part in lengths.values()) == max(map(len, LINES)) + 1
    shown = pretrain("inspect data/mixed").out
    assert f"{lengths['train']['longest']:,}" in shown
    assert "rows.jsonl" in shown
    assert f" {sparkline({int(n): c for n, c in lengths['train']['by_power'].items()})} " in shown


def test_a_sparkline_has_a_place_for_each_power_of_two():
    assert sparkline({1: 8, 2: 4, 16: 1}) == "█▅  ▂"
    assert sparkline({64: 3}) == "█"


def test_checks_are_shown_and_are_the_same_as_json(pretrain, dataset):
    facts = inspected(pretrain)
    checks = facts["checks"]
    documents = facts["splits"]["train"]["documents"]
    assert (checks["seed"], checks["documents"], checks["compared"]) == (0, documents, documents)
    for part in facts["sources"].values():
        assert part["tokens_per_byte"] == pytest.approx(part["tokens"] / part["bytes"])
    shown = pretrain("inspect data/mixed").out
    assert f"Checked, by seed 0, of {documents} training documents" in shown
    assert [line[2:] for line in shown.splitlines() if line[:1] == "!"] == checks["warnings"]
    assert "of the tokens come from one file, rows.jsonl" in checks["warnings"][0]
    assert inspected(pretrain, "--all")["checks"] == checks  # it is small


def test_lengths_and_sources_are_drawn(pretrain, refused, dataset):
    pytest.importorskip("matplotlib")
    for name, begins in (("picture.png", b"\x89PNG"), ("picture.svg", b"<?xml")):
        done = pretrain(f"inspect data/mixed --plot {name}")
        assert done.code == 0, done.err
        assert f"Written to {name}" in done.out
        assert Path(name).read_bytes().startswith(begins)
    assert "rows.jsonl" in Path("picture.svg").read_text()
    assert "--plot: picture.gif is neither" in refused("inspect data/mixed --plot picture.gif")


def test_an_epochs_samples_are_its_windows_in_seed_order(pretrain, dataset):
    tokens = np.fromfile(dataset / "train-00000.bin", "<u2")
    windows = (len(tokens) - 1) // 32
    seen = []
    for number in range(windows):
        sample = inspected(pretrain, f"--sample {number} --seq-len 32")["sample"]
        (stretch,) = sample["stretches"]
        first = stretch["first_token"]
        assert sample["tokens"] == tokens[first : first + 33].tolist()
        seen.append(first)
        text = "".join(document["text"] for document in sample["documents"])
        assert text == "".join("<|endoftext|>" if t == 256 else chr(t) for t in sample["tokens"])
        for document in sample["documents"][1:]:
            assert document["begins"]
    assert sorted(seen) == [32 * window for window in range(windows)]
    assert seen != sorted(seen)
    again = inspected(pretrain, f"--sample {windows} --seq-len 32")["sample"]
    assert again["epoch"] == 1
    other = [
        inspected(pretrain, f"--sample {n} --seq-len 32 --seed 1")["sample"]["stretches"]
        for n in range(windows)
    ]
    assert [stretch["first_token"] for (stretch,) in other] != seen


def test_an_inspected_sample_equals_the_training_sample(pretrain, dataset):
    opened = open_dataset(dataset)
    windows = Windows(
        opened.train.tokens,
        seq_len=32,
        fingerprint=opened.fingerprint,
        separator=opened.separator,
    )
    run = Batches([windows], [1], seq_len=32, samples_per_step=2, seed=7)
    for first in (0, 2):
        batch = run.starting_at(first)
        for row, number in enumerate((first, first + 1)):
            sample = inspected(pretrain, f"--sample {number} --seq-len 32 --seed 7")["sample"]
            assert sample["tokens"][:-1] == batch.inputs[row].tolist()
            assert sample["tokens"][1:] == batch.targets[row].tolist()


def test_an_inspected_packed_sample_equals_the_training_sample(pretrain, dataset):
    opened = open_dataset(dataset)
    run = Batches(
        [open_packed(opened, 64, lambda text: None)], [1], seq_len=64, samples_per_step=8, seed=7
    )
    batch = run.starting_at(0)
    for number, row in enumerate(batch.inputs.tolist()):
        shown = inspected(pretrain, f"--sample {number} --seq-len 64 --seed 7 --packing best-fit")
        sample = shown["sample"]
        assert len(sample["tokens"]) + sample["padding"] == 65
        assert [*sample["tokens"], *[0] * sample["padding"]][:-1] == row
        assert sum(stretch["tokens"] for stretch in sample["stretches"]) == len(sample["tokens"])
        assert all(document["begins"] for document in sample["documents"])  # none is cut
        assert len(sample["documents"]) == sample["tokens"].count(256)
    shown = pretrain("inspect data/mixed --sample 0 --seq-len 400 --packing best-fit").out
    assert "places of padding ──" in shown


def test_a_sample_shows_where_documents_begin(pretrain, dataset):
    shown = pretrain("inspect data/mixed --sample 0 --seq-len 200").out
    assert "── a document begins ──" in shown
    assert "<|endoftext|>" in shown


def test_verify_accepts_an_intact_dataset(pretrain, dataset):
    done = pretrain("inspect data/mixed --verify")
    assert done.code == 0
    assert "whole" in done.out
    assert inspected(pretrain, "--verify")["verified"] == "every checksum"


@pytest.mark.parametrize("place", [0, 501])
def test_verify_reports_the_shard_and_byte_range_of_a_flipped_bit(pretrain, dataset, place):
    path = dataset / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    done = pretrain("inspect data/mixed --verify")
    assert done.code == 1
    assert f"train-00000.bin: damaged between bytes 0 and {len(data):,}" in done.out  # one block
    assert pretrain("inspect data/mixed").code == 0  # the size is unchanged
    done = pretrain("inspect data/mixed --verify --json")
    assert done.code == 1
    assert "train-00000.bin" in json.loads(done.out)["damage"][0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train-00000.bin", "train-00000.bin: missing"),
        ("train-00000.idx", "train-00000.idx: missing"),
        ("tokenizer.json", "tokenizer.json: missing"),
        ("files.jsonl", "files.jsonl: missing"),
    ],
)
def test_a_missing_file_is_named(pretrain, dataset, name, said):
    (dataset / name).unlink()
    done = pretrain("inspect data/mixed")
    assert done.code == 1
    assert said in done.out


def test_a_truncated_shard_is_found_by_its_size(pretrain, dataset):
    path = dataset / "train-00000.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    done = pretrain("inspect data/mixed")
    assert done.code == 1
    assert f"train-00000.bin: {size - 2:,} bytes where dataset.json says {size:,}" in done.out


def test_a_replaced_tokenizer_is_found(pretrain, dataset):
    path = dataset / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    done = pretrain("inspect data/mixed")
    assert done.code == 1
    assert "not the tokenizer that made this dataset" in done.out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("inspect nowhere", "nowhere"),
        ("inspect data/mixed --sample -1", "--sample: -1 is not from 0 up to 2⁶³"),
        ("inspect data/mixed --sample 9223372036854775808", "is not from 0 up to 2⁶³"),
        ("inspect data/mixed --seq-len 32", "--seq-len: 32 is of a sample; say which with --samp"),
        ("inspect data/mixed --packing best-fit", "--packing: best-fit is of a sample; say which"),
        ("inspect data/mixed --seed 0", "--seed: 0 is of a sample; say which with --sample"),
        ("inspect data/mixed --sample 0 --seq-len 0", "--seq-len: 0 is not from 1 to"),
        ("inspect data/mixed --sample 0 --seq-len 100000", "--seq-len: 100000 is not from 1 to"),
    ],
)
def test_invalid_inspect_options_are_refused(refused, dataset, line, said):
    assert said in refused(line)


def test_a_manifest_of_a_later_format_is_refused(refused, dataset):
    path = dataset / "dataset.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format_version": 99}))
    assert "99" in refused("inspect data/mixed")


def test_a_folder_without_a_dataset_is_refused(refused, dataset):
    shutil.rmtree("texts")
    Path("texts").mkdir()
    assert "texts" in refused("inspect texts")
