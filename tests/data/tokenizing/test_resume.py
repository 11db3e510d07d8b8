"""A run that was killed, wherever it was, is gone on with, and the dataset is the same."""

import errno
import gzip
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from pretrain_cli.data.tokenizing import encoding, writer

# All of what follows happens within some 100 kB of text.
SMALL = {
    "pretrain_cli.data.tokenizing.pipeline.SECONDS_BETWEEN_NOTES": 0,
    "pretrain_cli.data.tokenizing.pipeline.BATCH_BYTES": 1000,
    "pretrain_cli.data.tokenizing.pipeline.BLOCK_CHARACTERS": 2000,
    "pretrain_cli.data.tokenizing.encoding.PIECE": 500,
    "pretrain_cli.data.corpus.readers.READ_BYTES": 1000,
    "pretrain_cli.data.corpus.readers.MAX_IN_MEMORY": 6000,
}
OPTIONS = [
    *("--tokenizer", "bytes", "--document-separator", "---"),
    *("--val-fraction", "0.2", "--shard-tokens", "10000"),
]
FULL = (
    "error: killed/made.partial: the disk is full; free some space and run the command again: it "
    "continues from what is finished\n"
)
WENT_ON = "Continued what an earlier run had finished"

ADD = "pretrain_cli.data.tokenizing.writer.DatasetWriter.add"
NOTE = "pretrain_cli.data.tokenizing.writer.DatasetWriter.note"
FINISH = "pretrain_cli.data.tokenizing.writer.DatasetWriter.finish"


@pytest.fixture
def small(monkeypatch):
    """In this process what `driven` changes in another."""
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)
    monkeypatch.setattr(os, "fsync", lambda file: None)


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
    """Return the dataset that an uninterrupted run makes with these options."""

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
        assert done.code in (0, -signal.SIGKILL), done.err
        return done.code != 0

    return run


# --- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "call", "goes_on"),
    [
        (ADD, 1, False),
        (ADD, 20, True),
        (ADD, 50, True),
        (NOTE, 1, False),
        (NOTE, 2, True),
        ("os.fsync", 100, True),
        ("pathlib.Path.replace", 10, True),
        ("pretrain_cli.data.tokenizing.open_shard.OpenShard.close", 3, True),
        ("pretrain_cli.data.tokenizing.writer.DatasetWriter.close_shards", 1, True),
        (FINISH, 1, True),
    ],
)
def test_a_killed_run_is_gone_on_with(straight, killed, again, function, call, goes_on):
    assert killed(function, call)
    expected = straight()
    assert again() == (expected, goes_on)


def test_a_run_that_is_killed_again_and_again_gets_to_its_end(straight, killed, again):
    kills = 0
    while killed(NOTE, 6):
        kills += 1
        assert kills < 30
    assert kills > 3
    assert again()[0] == straight()


@pytest.mark.parametrize("call", [3, 15, 25])
def test_duplicates_stay_left_out(straight, killed, again, call):
    """Also those of documents that were being encoded when the run was killed."""
    assert killed(NOTE, call, "--dedup")
    expected = straight("--dedup")
    assert json.loads(expected["dataset.json"])["duplicates"] == 20
    assert again("--dedup") == (expected, True)


@pytest.mark.parametrize("call", [2, 5, 9])
def test_one_long_document_is_gone_on_with_in_its_middle(
    corpus, straight, killed, again, call, monkeypatch
):
    for path in corpus.iterdir():
        if path.name != "b.txt":
            path.unlink()
    encoded = []
    real = encoding.Encoder.__call__

    def counted(self, batch):
        encoded.append(sum(len(block.text) for block in batch))
        return real(self, batch)

    assert killed(NOTE, call)
    with monkeypatch.context() as patch:
        patch.setattr(encoding.Encoder, "__call__", counted)
        found = again()
    assert sum(encoded) <= (corpus / "b.txt").stat().st_size - 2000 * (call - 1)
    assert found == (straight(), True)


def test_a_run_with_several_processes_is_gone_on_with(straight, killed, again):
    """By one process, since the number of them changes nothing."""
    assert killed(NOTE, 8, "--workers", "3", **{"pretrain_cli.data.tokenizing.pipeline.SMALL": 0})
    assert again() == (straight(), True)


# --- killed when all is tokenized ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("shutil.copyfile", 1),
        ("shutil.copyfile", 2),
        ("pretrain_cli.data.tokenizing.writer.DatasetWriter._as_training", 2),
        ("pretrain_cli.data.shards.TokenStream.read", 1),
        (FINISH, 1),
    ],
)
@pytest.mark.parametrize("fraction", ["0.000001", "0.999999"])
def test_a_run_killed_while_the_tail_is_held_out_is_gone_on_with(
    straight, killed, again, function, call, fraction
):
    """All documents fell into train, or all into val."""
    options = ["--val-fraction", fraction]
    assert killed(function, call, *options)
    assert again(*options) == (straight(*options), True)


@pytest.mark.parametrize(("function", "call"), [("shutil.copyfileobj", 2), (FINISH, 1)])
def test_a_run_killed_while_other_shards_are_written_is_gone_on_with(
    straight, killed, again, function, call
):
    assert killed(function, call, "--format", "llm.c")
    assert again("--format", "llm.c") == (straight("--format", "llm.c"), True)


def test_what_is_left_of_other_shards_is_in_nobodys_way(straight, killed, again):
    """A run with other options starts over."""
    assert killed("shutil.copyfileobj", 2, "--format", "llm.c")
    assert again() == (straight(), False)


@pytest.mark.parametrize("renames", [1, 2])
@pytest.mark.parametrize("force", [False, True])
def test_a_run_killed_while_the_dataset_is_moved_into_place_is_done(
    straight, killed, again, pretrain, renames, force
):
    """Aside, with its manifest; or with the one that it replaces out of the way already."""
    expected = straight()
    if force:
        assert pretrain("tokenize --tokenizer bytes corpus --out killed/made").code == 0
    options = ["--force"] * force
    assert killed("pathlib.Path.rename", renames, *options) == (renames == 1 or force)
    outcome = again()
    assert outcome == (expected, False)


# --- not killed, but stopped ---------------------------------------------------------------------


def test_a_run_that_is_interrupted_is_gone_on_with(straight, again, pretrain, small, monkeypatch):
    """By Ctrl-C; what isn't noted is given up."""
    calls = []
    real = writer.DatasetWriter.note

    def interrupt(self, progress):
        real(self, progress)
        calls.append(progress)
        if len(calls) == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.DatasetWriter, "note", interrupt)
        assert pretrain(" ".join(["tokenize corpus --out killed/made", *OPTIONS])).code == 130
    assert again() == (straight(), True)


@pytest.mark.parametrize("where", ["add", "note", "hold_out_tail", "finish"])
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    straight, again, pretrain, small, monkeypatch, where
):
    options = ["--val-fraction", "0.000001"]
    calls = []
    real = getattr(writer.DatasetWriter, where)

    def full(self, *given, **named):
        calls.append(given)
        if len(calls) == (1 if where in ("hold_out_tail", "finish") else 12):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(writer.DatasetWriter, where, full)
        done = pretrain(" ".join(["tokenize corpus --out killed/made", *OPTIONS, *options]))
    assert (done.code, done.err) == (2, FULL)
    assert again(*options) == (straight(*options), True)


def test_a_disk_that_the_copy_of_a_long_document_fills(
    again, straight, pretrain, small, monkeypatch
):
    real = tempfile.TemporaryFile

    def full(**options):
        file = real(**options)
        file.close()
        return open("/dev/full", "wb+", buffering=0)

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", full)
        done = pretrain(" ".join(["tokenize corpus --out killed/made", *OPTIONS]))
    assert (done.code, done.err) == (2, FULL)
    assert again() == (straight(), True)


def test_a_disk_that_the_digests_of_documents_fill(again, straight, pretrain, small, monkeypatch):
    real = sqlite3.connect

    def small_one(path):
        database = real(path)
        database.execute("PRAGMA page_size = 512")
        database.execute("PRAGMA max_page_count = 5")
        return database

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", small_one)
        done = pretrain(" ".join(["tokenize corpus --out killed/made --dedup", *OPTIONS]))
    assert (done.code, done.err) == (2, FULL)
    assert again("--dedup") == (straight("--dedup"), True)


# --- something else has changed since ------------------------------------------------------------


def test_a_file_that_was_changed_while_it_was_at_hand_is_begun_anew(
    corpus, straight, killed, again
):
    """And those before it are not."""
    assert killed(NOTE, 13)
    progress = json.loads(Path("killed/made.partial/progress.json").read_text())
    assert progress["file"][0] == "corpus/b.txt"
    assert progress["here"]["place"] > progress["file_began"]["place"]
    (corpus / "b.txt").write_text(sentences(500, 3500))
    assert again() == (straight(), True)


def test_a_file_that_was_changed_twice_is_begun_anew_twice(corpus, straight, killed, again):
    """The first of the corpus, behind nothing; and another."""
    for name, notes in (("a.jsonl", 4), ("a.jsonl", 3), ("b.txt", 12), ("b.txt", 5)):
        assert killed(NOTE, notes)
        progress = json.loads(Path("killed/made.partial/progress.json").read_text())
        assert progress["file"][0] == f"corpus/{name}"
        data = (corpus / name).read_bytes()
        (corpus / name).write_bytes(data.splitlines(keepends=True)[0] + data)
    assert again() == (straight(), True)


def test_a_file_that_was_done_with_and_changed_starts_all_over(corpus, straight, killed, again):
    assert killed(NOTE, 20)
    lines = (corpus / "a.jsonl").read_bytes()
    (corpus / "a.jsonl").write_bytes(lines.replace(b"over", b"OVER"))
    assert again() == (straight(), False)


def test_a_file_that_was_touched_and_not_changed_is_as_it_was(corpus, straight, killed, again):
    assert killed(NOTE, 20)
    expected = straight()
    os.utime(corpus / "a.jsonl", ns=(0, 0))
    assert again() == (expected, True)


@pytest.mark.parametrize(("name", "goes_on"), [("0.txt", False), ("d2.txt", True)])
def test_a_file_that_is_new(corpus, straight, killed, again, name, goes_on):
    """Before what is done with, or behind it."""
    assert killed(NOTE, 20)
    (corpus / name).write_text(sentences(600, 200))
    assert again() == (straight(), goes_on)


@pytest.mark.parametrize(
    "options",
    [["--val-fraction", "0.3"], ["--errors", "replace"], ["--dedup"], ["--shard-tokens", "9000"]],
)
def test_another_option_starts_over(straight, killed, again, options):
    assert killed(NOTE, 20)
    assert again(*options) == (straight(*options), False)


def test_another_tokenizer_in_the_same_file_starts_over(tmp_path, straight, killed, again, load):
    mine = ["--tokenizer", "mine.json"]
    (tmp_path / "mine.json").write_text(load("bytes").json)
    assert killed(NOTE, 20, *mine)
    (tmp_path / "mine.json").write_text(load("bpe").json)
    assert again(*mine) == (straight(*mine), False)


@pytest.mark.parametrize("size", [[], ["--vocab-size", "300"]])
def test_a_bpe_is_trained_once(straight, killed, again, monkeypatch, size):
    options = ["--tokenizer", "bpe", *size]
    assert killed(NOTE, 20, *options)
    expected = straight(*options)
    monkeypatch.setattr("pretrain_cli.data.tokenizing.tokenize.train_bpe", None)
    assert again(*options) == (expected, True)


@pytest.mark.parametrize("left", ["{}", "{", '{"options": 1, "here": []}'])
def test_a_note_that_is_not_understood_starts_over(straight, killed, again, left):
    """The progress file may be of another version."""
    assert killed(NOTE, 20)
    Path("killed/made.partial/progress.json").write_text(left)
    assert again() == (straight(), False)


def test_shards_that_are_gone_start_over(straight, killed, again):
    assert killed(NOTE, 20)
    Path("killed/made.partial/train-00000.idx").unlink()
    assert again() == (straight(), False)


def test_two_runs_of_one_dataset_at_once_are_refused(corpus, straight, pretrain, driven, tmp_path):
    """The second says so and touches nothing."""
    expected = straight()
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    arguments = ["tokenize", "corpus", "pipe", "--out", "killed/made", *OPTIONS]
    outcome = []
    first = threading.Thread(target=lambda: outcome.append(driven(arguments, tmp_path, SMALL)))
    first.start()
    with fifo.open("wb") as pipe:  # open when the first reads it, and has read the rest
        done = pretrain(" ".join(["tokenize corpus --out killed/made", *OPTIONS]))
        pipe.write(b"the end")
    first.join()
    assert done.code == 2
    assert done.err == (
        "error: killed/made.partial: another process is writing it; wait for it, or choose another "
        "folder with --out\n"
    )
    assert outcome[0].code == 0
    made = Path("killed/made")
    for shard in ("train-00000.bin", "val-00000.bin"):
        assert (made / shard).read_bytes().startswith(expected[shard][:1000])


# --- at any instant ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--dedup", "--workers", "3"]], ids=["plain", "dedup"])
def test_twenty_kills_at_random_instants_change_nothing(
    tmp_path, monkeypatch, pretrain, start, contents, options
):
    """Some MB in files of every kind, the dataset growing as in a long run, some notes a second."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(12):
        texts = [sentences(100 * number + part, 400) for part in range(120)]
        lines = "\n".join(json.dumps({"text": text}) for text in texts + texts[:9])
        (folder / f"{number:02d}-a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
        (folder / f"{number:02d}-b.txt").write_text("\n".join(texts))
        (folder / f"{number:02d}-c.txt").write_text("\n---\n".join(texts[:30]))
    changes = SMALL | {
        "pretrain_cli.data.tokenizing.pipeline.SECONDS_BETWEEN_NOTES": 0.02,
        "pretrain_cli.data.tokenizing.pipeline.BATCH_BYTES": 20_000,
        "pretrain_cli.data.tokenizing.pipeline.BLOCK_CHARACTERS": 20_000,
        "pretrain_cli.data.tokenizing.pipeline.SMALL": 0,
    }
    arguments = ["tokenize", "corpus", *OPTIONS, "--shard-tokens", "300000", *options, "--out"]

    def run(out, seconds=None):
        """Return whether the command ends within `seconds`; kill it otherwise."""
        with start([*arguments, out], tmp_path, changes) as process:
            try:
                _, err = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                return False
        assert process.returncode == 0, err
        return True

    assert run("straight/made")
    expected = contents(tmp_path / "straight/made")
    order = random.Random(0)
    kills = ends = 0
    while kills < 20 or not ends:
        if not run("killed/made", order.uniform(0.5, 1.2)):
            kills += 1
            continue
        ends += 1
        assert contents(tmp_path / "killed/made") == expected
        shutil.rmtree(tmp_path / "killed")
