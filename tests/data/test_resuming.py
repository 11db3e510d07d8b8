"""A run that was killed, wherever it was, is gone on with, and the dataset is the same."""

import gzip
import json
import random
import signal
from pathlib import Path

import pytest

from pretrain_cli.data import pipeline

# All of what follows happens within some 100 kB of text.
SMALL = {
    "pretrain_cli.data.pipeline.SECONDS_BETWEEN_NOTES": 0,
    "pretrain_cli.data.pipeline.BATCH_BYTES": 3000,
    "pretrain_cli.data.pipeline.BLOCK_CHARACTERS": 2000,
    "pretrain_cli.data.encoding.PIECE": 500,
    "pretrain_cli.data.text.BLOCK": 1000,
    "pretrain_cli.data.text.HELD": 6000,
}
OPTIONS = ["--tokenizer", "bytes", "--document-separator", "---", "--shard-tokens", "10000"]
WENT_ON = "Went on from what an earlier run had finished"

ADD = "pretrain_cli.data.writer.DatasetWriter.add"
NOTE = "pretrain_cli.data.writer.DatasetWriter.note"
CLOSE = "pretrain_cli.data.writer.DatasetWriter.close_shards"
TAIL = "pretrain_cli.data.writer.DatasetWriter.hold_out_tail"
RENAME = "pathlib.Path.rename"


@pytest.fixture
def small(monkeypatch):
    """In this process what `driven` changes in another."""
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)


def sentences(number, count):
    order = random.Random(number)
    words = [f"word{number}", "grün", "你好", "fox,", "jumps.\n", "over", "👋"]
    return " ".join(order.choices(words, k=count))


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """`corpus/` in the current folder: short documents, some of them twice, and long ones."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    short = [sentences(number, 30) for number in range(60)]
    lines = [json.dumps({"text": value}) for value in short[:40] + short[10:20]]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text(sentences(100, 4000))
    (folder / "c.txt.gz").write_bytes(
        gzip.compress("\n---\n".join(short[30:] + [sentences(101, 3000)]).encode(), mtime=0)
    )
    (folder / "d.txt").write_bytes(b"not UTF-8: \xff")
    (folder / "e.txt").write_text("\n---\n".join([*short[50:], "the last"]))
    return folder


@pytest.fixture
def straight(pretrain, corpus, small, contents):
    """What a run that nothing happens to makes, with these options."""

    def run(*options, out="straight/made"):
        done = pretrain(" ".join(["tokenize", "corpus", "--out", out, *OPTIONS, *options]))
        assert done.code == 0, done.err
        assert WENT_ON not in done.out
        return contents(Path(out))

    return run


@pytest.fixture
def again(pretrain, small, contents):
    """The same command another time: (what is there behind it, whether it went on)."""

    def run(*options, out="killed/made"):
        done = pretrain(" ".join(["tokenize", "corpus", "--out", out, *OPTIONS, *options]))
        assert done.code == 0, done.err
        place = Path(out)
        assert [path.name for path in place.parent.iterdir()] == [place.name]
        return contents(place), WENT_ON in done.out

    return run


@pytest.fixture
def killed(driven, tmp_path):
    """The same command in a process that is killed at a call of a function."""

    def run(function, call, *options, out="killed/made", **changes):
        arguments = ["tokenize", "corpus", "--out", out, *OPTIONS, *options]
        done = driven(arguments, tmp_path, SMALL | changes, killed_at=(function, call))
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode != 0

    return run


# --- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "call", "goes_on"),
    [
        (ADD, 1, False),
        (ADD, 20, True),
        (ADD, 75, True),
        (NOTE, 1, False),
        (NOTE, 12, True),
        ("os.replace", 5, True),  # of the tokenizer, and of notes
        ("pretrain_cli.data.writer._OpenShard.close", 3, True),
        (CLOSE, 1, True),
        ("pretrain_cli.data.writer.DatasetWriter.finish", 1, True),
        ("pretrain_cli.data.writer.write_whole", 40, True),
    ],
)
def test_a_killed_run_is_gone_on_with(straight, killed, again, function, call, goes_on):
    assert killed(function, call)
    expected = straight()
    assert again() == (expected, goes_on)


def test_a_run_that_is_killed_again_and_again_gets_to_its_end(straight, killed, again):
    kills = 0
    while killed(ADD, 25):
        kills += 1
        assert kills < 30
    assert kills > 3
    assert again()[0] == straight()


@pytest.mark.parametrize("call", [10, 45, 70])
def test_duplicates_stay_left_out(straight, killed, again, call):
    """Also those of documents that were being encoded when the run was killed."""
    assert killed(ADD, call, "--dedup")
    expected = straight("--dedup")
    assert json.loads(expected["dataset.json"])["duplicates"] == 31
    assert again("--dedup") == (expected, True)


@pytest.mark.parametrize("call", [5, 17, 31])
def test_one_long_document_is_gone_on_with_in_its_middle(
    corpus, straight, killed, again, call, monkeypatch
):
    for path in corpus.iterdir():
        if path.name != "b.txt":
            path.unlink()
    assert killed(NOTE, call, "--val-fraction", "0")
    monkeypatch.setattr(pipeline, "_blocks", counting := Counting(pipeline._blocks))
    got = again("--val-fraction", "0")
    assert counting.calls == 1
    assert got == (straight("--val-fraction", "0"), True)


class Counting:
    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *given):
        self.calls += 1
        return self.function(*given)
