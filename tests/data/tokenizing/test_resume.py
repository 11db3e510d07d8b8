"""Resuming: a run killed at any point makes the same dataset as an uninterrupted run."""

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
import time
from pathlib import Path

import pytest

from pretrain_cli.data.tokenizing import encoder, shard_writer, writer

# Small sizes, so that a corpus of about 100 kB has many batches, blocks and saves.
SMALL = {
    "pretrain_cli.data.tokenizing.pipeline.SECONDS_BETWEEN_SAVES": 0,
    "pretrain_cli.data.tokenizing.pipeline.TASK_BYTES": 1000,
    "pretrain_cli.data.tokenizing.pipeline.WHOLE_FILE": 5000,
    "pretrain_cli.data.tokenizing.pipeline.LONG_RECORD": 6000,
    "pretrain_cli.data.corpus.records.READ_AT_ONCE": 1000,
    "pretrain_cli.data.corpus.json_records.READ_AT_ONCE": 1000,
    "pretrain_cli.data.tokenizing.blocks.BLOCK_CHARACTERS": 2000,
    "pretrain_cli.data.tokenizing.encoder.PIECE": 500,
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

ADD = "pretrain_cli.data.tokenizing.shard_writer.ShardWriter.add"
NOTE = "pretrain_cli.data.tokenizing.writer.DatasetWriter.save_progress"
FINISH = "pretrain_cli.data.tokenizing.writer.DatasetWriter.finish"


@pytest.fixture
def small(monkeypatch):
    """Change the constants of this process as `driven` changes those of another."""
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)
    monkeypatch.setattr(os, "fsync", lambda file: None)


def sentences(number, count):
    order = random.Random(number)
    words = [f"word{number}", "grün", "你好", "fox,", "jumps.\n", "over", "👋"]
    return " ".join(order.choices(words, k=count))


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Path of `corpus/` in the current folder: long documents, and short ones with duplicates."""
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
    """Function that returns the dataset of an uninterrupted run with these options."""

    def run(*options, out="straight/made"):
        done = pretrain(" ".join(["tokenize", "corpus", "--out", out, *OPTIONS, *options]))
        assert done.code == 0, done.err
        assert WENT_ON not in done.out
        return contents(Path(out))

    return run


@pytest.fixture
def again(pretrain, small, contents):
    """Function that runs the command again; returns (the dataset, whether the run resumed)."""

    def run(*options, out="killed/made"):
        done = pretrain(" ".join(["tokenize", "corpus", "--out", out, *OPTIONS, *options]))
        assert done.code == 0, done.err
        place = Path(out)
        assert [path.name for path in place.parent.iterdir()] == [place.name]
        return contents(place), WENT_ON in done.out

    return run


@pytest.fixture
def killed(driven, tmp_path):
    """Function that runs the command in a process that is killed at the n-th call of a function;
    returns whether it was killed before it finished."""

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
        ("pretrain_cli.data.tokenizing.shard_writer.OpenShard.close", 3, True),
        ("pretrain_cli.data.tokenizing.shard_writer.ShardWriter.close", 1, True),
        (FINISH, 1, True),
    ],
)
def test_a_killed_run_resumes_from_its_saved_progress(
    straight, killed, again, function, call, goes_on
):
    assert killed(function, call)
    expected = straight()
    assert again() == (expected, goes_on)


def test_a_run_that_is_killed_repeatedly_finishes(straight, killed, again):
    kills = 0
    while killed(NOTE, 6):
        kills += 1
        assert kills < 30
    assert kills > 3
    assert again()[0] == straight()


@pytest.mark.parametrize("call", [3, 15, 25])
def test_duplicates_stay_left_out_after_a_resume(straight, killed, again, call):
    """This includes duplicates of documents that were being encoded when the run was killed."""
    assert killed(NOTE, call, "--dedup")
    expected = straight("--dedup")
    assert json.loads(expected["dataset.json"])["duplicates"] == 20
    assert again("--dedup") == (expected, True)


@pytest.mark.parametrize("call", [2, 5, 9])
def test_a_run_resumes_inside_a_long_document(corpus, straight, killed, again, call, monkeypatch):
    for path in corpus.iterdir():
        if path.name != "b.txt":
            path.unlink()
    encoded = []
    real = encoder.LibraryEncoder.encode

    def counted(self, texts, continues):
        encoded.append(sum(map(len, texts)))
        return real(self, texts, continues)

    assert killed(NOTE, call)
    with monkeypatch.context() as patch:
        patch.setattr(encoder.LibraryEncoder, "encode", counted)
        found = again()
    assert sum(encoded) <= (corpus / "b.txt").stat().st_size - 2000 * (call - 1)
    assert found == (straight(), True)


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("call", [2, 5, 9, 13])
def test_a_run_resumes_inside_a_file_of_records(corpus, straight, killed, again, call, workers):
    """Long records are cut into blocks; nulls and what is not UTF-8 are counted once."""
    for path in corpus.iterdir():
        path.unlink()
    texts = [sentences(number, 900 if number % 9 == 4 else 30) for number in range(50)]
    lines = [json.dumps({"text": text}).encode() for text in texts]
    lines[3::7] = [b'{"text": null}'] * 7
    lines[5::11] = [b'{"text": "caf\xe9"}'] * 5
    (corpus / "a.jsonl").write_bytes(b"\n".join(lines))
    expected = straight()
    (row,) = map(json.loads, expected["files.jsonl"].splitlines())
    assert row["remarks"] == {"null, left out": 6, "not UTF-8, left out": 5}
    changes = {"pretrain_cli.data.tokenizing.pipeline.SMALL": 0} if workers != "0" else {}
    assert killed(NOTE, call, *(["--workers", workers] if changes else []), **changes)
    assert again() == (expected, True)


def test_the_progress_of_another_version_is_not_continued(straight, killed, again):
    """Its position may mean something else."""
    assert killed(NOTE, 8)
    path = Path("killed/made.partial/progress.json")
    saved = json.loads(path.read_text())
    del saved["version"]  # as before version 2
    path.write_text(json.dumps(saved))
    assert again() == (straight(), False)


def test_a_run_with_several_processes_resumes_with_one(straight, killed, again):
    """The number of processes may differ, because the dataset does not depend on it."""
    assert killed(NOTE, 8, "--workers", "3", **{"pretrain_cli.data.tokenizing.pipeline.SMALL": 0})
    assert again() == (straight(), True)


# --- killed after the last document --------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("shutil.copyfile", 1),
        ("shutil.copyfile", 2),
        ("pretrain_cli.data.tokenizing.shard_writer.ShardWriter._as_training", 2),
        ("pretrain_cli.data.shards.TokenStream.read", 1),
        (FINISH, 1),
    ],
)
@pytest.mark.parametrize("fraction", ["0.000001", "0.999999"])
def test_a_run_killed_while_it_holds_out_the_tail_resumes(
    straight, killed, again, function, call, fraction
):
    """The hash puts all documents into train, or all into val."""
    options = ["--val-fraction", fraction]
    assert killed(function, call, *options)
    assert again(*options) == (straight(*options), True)


@pytest.mark.parametrize(("function", "call"), [("shutil.copyfileobj", 2), (FINISH, 1)])
def test_a_run_killed_while_it_writes_llm_c_files_resumes(straight, killed, again, function, call):
    assert killed(function, call, "--format", "llm.c")
    assert again("--format", "llm.c") == (straight("--format", "llm.c"), True)


def test_leftover_llm_c_files_do_not_disturb_another_run(straight, killed, again):
    """A run with other options starts over."""
    assert killed("shutil.copyfileobj", 2, "--format", "llm.c")
    assert again() == (straight(), False)


@pytest.mark.parametrize("renames", [1, 2])
@pytest.mark.parametrize("force", [False, True])
def test_a_run_killed_while_it_moves_the_dataset_is_complete(
    straight, killed, again, pretrain, renames, force
):
    """With --force, the kill comes before or after the old dataset is moved away."""
    expected = straight()
    if force:
        assert pretrain("tokenize --tokenizer bytes corpus --out killed/made").code == 0
    options = ["--force"] * force
    assert killed("pathlib.Path.rename", renames, *options) == (renames == 1 or force)
    outcome = again()
    assert outcome == (expected, False)


# --- interrupted, or out of disk space -----------------------------------------------------------


def test_an_interrupted_run_resumes(straight, again, pretrain, small, monkeypatch):
    """Ctrl-C discards work that is not saved."""
    calls = []
    real = writer.DatasetWriter.save_progress

    def interrupt(self):
        real(self)
        calls.append(self.blocks.place)
        if len(calls) == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.DatasetWriter, "save_progress", interrupt)
        assert pretrain(" ".join(["tokenize corpus --out killed/made", *OPTIONS])).code == 130
    assert again() == (straight(), True)


@pytest.mark.parametrize("where", ["add", "save_progress", "hold_out_tail", "finish"])
def test_a_full_disk_prints_one_line_and_the_next_run_resumes(
    straight, again, pretrain, small, monkeypatch, where
):
    options = ["--val-fraction", "0.000001"]
    calls = []
    part = (
        writer.DatasetWriter if hasattr(writer.DatasetWriter, where) else shard_writer.ShardWriter
    )
    real = getattr(part, where)

    def full(self, *given, **named):
        calls.append(given)
        if len(calls) == (1 if where in ("hold_out_tail", "finish") else 12):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(part, where, full)
        done = pretrain(" ".join(["tokenize corpus --out killed/made", *OPTIONS, *options]))
    assert (done.code, done.err) == (2, FULL)
    assert again(*options) == (straight(*options), True)


def test_a_disk_filled_by_the_copy_of_a_long_document_is_reported(
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


def test_a_disk_filled_by_the_duplicate_index_is_reported(
    again, straight, pretrain, small, monkeypatch
):
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


# --- changes between the two runs ----------------------------------------------------------------


def test_a_current_file_that_changed_is_read_again(corpus, straight, killed, again):
    """The files before it are not read again."""
    assert killed(NOTE, 13)
    progress = json.loads(Path("killed/made.partial/progress.json").read_text())
    assert progress["file"][0] == "corpus/b.txt"
    assert progress["here"]["place"] > progress["file_began"]["place"]
    (corpus / "b.txt").write_text(sentences(500, 3500))
    assert again() == (straight(), True)


def test_a_current_file_that_changed_twice_is_read_again_twice(corpus, straight, killed, again):
    """The file is the first of the corpus, then a later one."""
    for name, notes in (("a.jsonl", 4), ("a.jsonl", 3), ("b.txt", 12), ("b.txt", 5)):
        assert killed(NOTE, notes)
        progress = json.loads(Path("killed/made.partial/progress.json").read_text())
        assert progress["file"][0] == f"corpus/{name}"
        data = (corpus / name).read_bytes()
        (corpus / name).write_bytes(data.splitlines(keepends=True)[0] + data)
    assert again() == (straight(), True)


def test_a_finished_file_that_changed_restarts_the_run(corpus, straight, killed, again):
    assert killed(NOTE, 20)
    lines = (corpus / "a.jsonl").read_bytes()
    (corpus / "a.jsonl").write_bytes(lines.replace(b"over", b"OVER"))
    assert again() == (straight(), False)


def test_a_finished_file_with_only_a_new_time_lets_the_run_resume(corpus, straight, killed, again):
    assert killed(NOTE, 20)
    expected = straight()
    os.utime(corpus / "a.jsonl", ns=(0, 0))
    assert again() == (expected, True)


@pytest.mark.parametrize(("name", "goes_on"), [("0.txt", False), ("d2.txt", True)])
def test_a_new_file_restarts_the_run_only_before_finished_files(
    corpus, straight, killed, again, name, goes_on
):
    """0.txt sorts before the finished files, d2.txt after them."""
    assert killed(NOTE, 20)
    (corpus / name).write_text(sentences(600, 200))
    assert again() == (straight(), goes_on)


@pytest.mark.parametrize(
    "options",
    [["--val-fraction", "0.3"], ["--errors", "replace"], ["--dedup"], ["--shard-tokens", "9000"]],
)
def test_another_option_restarts_the_run(straight, killed, again, options):
    assert killed(NOTE, 20)
    assert again(*options) == (straight(*options), False)


def test_another_tokenizer_in_the_same_file_restarts_the_run(
    tmp_path, straight, killed, again, load
):
    mine = ["--tokenizer", "mine.json"]
    (tmp_path / "mine.json").write_text(load("bytes").json)
    assert killed(NOTE, 20, *mine)
    (tmp_path / "mine.json").write_text(load("bpe").json)
    assert again(*mine) == (straight(*mine), False)


@pytest.mark.parametrize("size", [[], ["--vocab-size", "300"]])
def test_a_resumed_run_does_not_train_its_bpe_again(straight, killed, again, monkeypatch, size):
    options = ["--tokenizer", "bpe", *size]
    assert killed(NOTE, 20, *options)
    expected = straight(*options)
    monkeypatch.setattr("pretrain_cli.data.tokenizing.choose_tokenizer.train_bpe", None)
    assert again(*options) == (expected, True)


@pytest.mark.parametrize("left", ["{}", "{", '{"options": 1, "here": []}'])
def test_unreadable_progress_restarts_the_run(straight, killed, again, left):
    """The progress file may come from another version of the program."""
    assert killed(NOTE, 20)
    Path("killed/made.partial/progress.json").write_text(left)
    assert again() == (straight(), False)


def test_a_missing_shard_restarts_the_run(straight, killed, again):
    assert killed(NOTE, 20)
    Path("killed/made.partial/train-00000.idx").unlink()
    assert again() == (straight(), False)


def test_a_second_run_on_the_same_dataset_is_refused(corpus, straight, pretrain, driven, tmp_path):
    """The second run prints an error and changes nothing."""
    expected = straight()
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    arguments = ["tokenize", "corpus", "pipe", "--out", "killed/made", *OPTIONS]
    outcome = []
    first = threading.Thread(target=lambda: outcome.append(driven(arguments, tmp_path, SMALL)))
    first.start()
    with fifo.open("wb") as pipe:  # waits until the first run has read `corpus`
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


# --- kills at random times -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--dedup", "--workers", "3"]], ids=["plain", "dedup"])
def test_twenty_kills_at_random_times_do_not_change_the_dataset(
    tmp_path, monkeypatch, pretrain, start, contents, options
):
    """The corpus has a few MB in files of several kinds, so the dataset grows as in a long run.
    Progress is saved up to 50 times a second."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(12):
        texts = [sentences(100 * number + part, 400) for part in range(120)]
        lines = "\n".join(json.dumps({"text": text}) for text in texts + texts[:9])
        (folder / f"{number:02d}-a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
        (folder / f"{number:02d}-b.txt").write_text("\n".join(texts))
        (folder / f"{number:02d}-c.txt").write_text("\n---\n".join(texts[:30]))
    changes = SMALL | {
        "pretrain_cli.data.tokenizing.pipeline.SECONDS_BETWEEN_SAVES": 0.02,
        "pretrain_cli.data.tokenizing.pipeline.TASK_BYTES": 20_000,
        "pretrain_cli.data.tokenizing.blocks.BLOCK_CHARACTERS": 20_000,
        "pretrain_cli.data.tokenizing.pipeline.SMALL": 0,
    }
    arguments = ["tokenize", "corpus", *OPTIONS, "--shard-tokens", "300000", *options, "--out"]

    def run(out, seconds=None):
        """Return whether the command ends within `seconds`; kill it otherwise."""
        with start([*arguments, str(out)], tmp_path, changes) as process:
            try:
                _, err = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                return False
        assert process.returncode == 0, err
        return True

    began = time.monotonic()
    assert run("straight/made")
    seconds = time.monotonic() - began
    expected = contents(tmp_path / "straight/made")
    made, order = tmp_path / "killed/made", random.Random(0)
    kills = resumable = 0
    while kills < 20:
        if run(made, order.uniform(0.4, 1.0) * seconds):
            assert contents(made) == expected
            shutil.rmtree(made.parent)
            seconds *= 0.9  # the first run was slower than this one
        else:
            kills += 1
            resumable += (tmp_path / "killed/made.partial/progress.json").exists()
    assert run(made)
    assert contents(made) == expected
    assert resumable > 5
