"""Encoding: blocks of text become tokens in the same order for any number of processes."""

import gc
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain_cli.data.tokenizing import blocks, encoding, pipeline
from pretrain_cli.data.tokenizing.blocks import Block, Encoded, Task
from pretrain_cli.data.tokenizing.encoder import LibraryEncoder
from pretrain_cli.data.tokenizing.encoding import TaskEncoder, on_processes
from pretrain_cli.errors import DataError

DTYPE = np.dtype("<u4")
TEXTS = [f"Text {number}: {'äöü and words, ' * (number % 50)}\n" for number in range(300)]


def work_of(tokenizer):
    return TaskEncoder(tokenizer, LibraryEncoder(tokenizer), DTYPE)


def tasks_of(batches):
    return (Task(batch, 0) for batch in batches)


@pytest.fixture
def busy(monkeypatch):
    """Split a small corpus into many batches, and use several processes for it."""
    monkeypatch.setattr(pipeline, "SMALL", 0)
    monkeypatch.setattr(pipeline, "TASK_BYTES", 3000)
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 2000)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2", "llama2"])
def test_a_batch_is_encoded_by_block_with_document_marks(load, kind):
    tokenizer = load(kind)
    batch = [Block(b"One.", True, True), Block(b"Two, ", True, False), Block(b"", True, True)]
    encoded = work_of(tokenizer)(Task(batch, 0))
    tokens = encoded.tokens
    assert tokens.dtype == DTYPE
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    one, two = (tokenizer.backend.encode(text, add_special_tokens=False).ids
                for text in ("One.", "Two, "))  # fmt: skip
    parts = [[*begin, *one, tokenizer.eos], [*begin, *two], [*begin, tokenizer.eos]]
    assert tokens.tolist() == [token for part in parts for token in part]
    assert encoded.blocks["tokens"].tolist() == list(map(len, parts))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_batches_are_returned_in_their_order(load, workers):
    """Batches take different times."""
    batches = [[Block(b"%d " % number * (number % 7 * 100), True, True)] for number in range(40)]
    encode = work_of(load("bytes"))
    expected = [encode(task).tokens.tolist() for task in tasks_of(batches)]
    with on_processes(work_of(load("bytes")), workers) as several:
        assert [encoded.tokens.tolist() for encoded in several(tasks_of(batches))] == expected


def dirtied(slot, task):
    """Return the bytes of shared memory that a garbage collection in a worker process writes to."""

    def private():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "Private_Dirty" in line)

    before = private()
    gc.collect()
    return Encoded(private() - before, None, [], 0, 0, False)


@pytest.mark.skipif(
    encoding.START != "fork" or not Path("/proc/self/smaps_rollup").is_file(),
    reason="nothing is shared, or it can't be told",
)
def test_memory_shared_with_workers_survives_garbage_collection(load, monkeypatch):
    monkeypatch.setattr(encoding, "_encode", dirtied)
    shared = [[] for _ in range(500_000)]  # 36 MB
    with on_processes(work_of(load("bytes")), 2) as several:
        (written,) = several(tasks_of([[]]))
    assert written.tokens < 5_000_000
    assert len(shared) == 500_000
    assert gc.get_freeze_count() == 0  # unfrozen again afterwards


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "llama2"])
def test_any_number_of_processes_makes_the_same_dataset(
    tmp_path, load, make, write_documents, contents, busy, kind
):
    load(kind)  # skips without its file
    corpus = write_documents(tmp_path / "corpus", [*TEXTS, " ".join(TEXTS)])
    seen = []
    for workers in (1, 2, 3):
        make(corpus, tmp_path / "made", tokenizer=kind, val_fraction=0.1, dedup=True, force=True,
             shard_tokens=20_000, workers=workers)  # fmt: skip
        seen.append(contents(tmp_path / "made"))
    assert seen[0] == seen[1] == seen[2]
    assert len([name for name in seen[0] if name.endswith(".bin")]) > 2


def test_special_tokens_are_text_in_spawned_processes(load, monkeypatch):
    monkeypatch.setattr(encoding, "START", "spawn")
    texts = [b"<|endoftext|>", b"before <|endoftext|> behind"]
    with on_processes(work_of(load("bytes")), 2) as encode:
        encoded = list(encode(tasks_of([[Block(text, True, True)] for text in texts])))
    assert [batch.tokens.tolist() for batch in encoded] == [[*text, 256] for text in texts]


def test_reading_runs_ahead_by_a_few_batches(load):
    """The limit bounds memory, which holds all batches in flight."""
    begun = []

    def batches():
        for number in range(50):
            begun.append(number)
            yield [Block(b"text", True, True)]

    with on_processes(work_of(load("bytes")), 2) as encode:
        for done, _ in enumerate(encode(tasks_of(batches()))):
            assert len(begun) <= done + 2 + encoding.IN_FLIGHT_PER_WORKER * 2


def test_encoders_restore_the_environment(load, monkeypatch):
    for value in (None, "true"):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if value:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        with on_processes(work_of(load("bytes")), 2) as encode:
            list(encode(tasks_of([[Block(b"text", True, True)]])))
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value


def test_a_killed_encoding_process_is_reported_in_one_line(
    tmp_path, make, write_documents, busy, monkeypatch
):
    """The system kills a process like this when memory runs out."""
    corpus = write_documents(tmp_path / "corpus", [*TEXTS, "end here", *TEXTS])
    real = LibraryEncoder.encode

    def end(self, texts, continues):
        if b"end here" in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, texts, continues)

    monkeypatch.setattr(LibraryEncoder, "encode", end)
    with pytest.raises(DataError) as error:
        make(corpus, tmp_path / "made", workers=2, encoder="tokenizers")
    assert str(error.value) == (
        "a tokenizing process was ended from outside, perhaps because memory ran out; run the "
        "command "
        "again, with fewer --workers"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    monkeypatch.undo()
    assert not make(corpus, tmp_path / "made").was_there


def test_bad_input_is_reported_in_one_line_with_several_processes(
    tmp_path, make, write_documents, busy
):
    corpus = write_documents(tmp_path / "corpus", TEXTS)
    (corpus / "zzz.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"zzz\.jsonl:1: not a JSON line"):
        make(corpus, tmp_path / "made", workers=3)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_processes_that_have_grown_are_replaced(load, monkeypatch):
    """Tasks keep their order, and the processes of the first pool end."""
    pids = []
    monkeypatch.setattr(encoding, "MEMORY_GROWTH", -1)
    real = TaskEncoder.__call__
    monkeypatch.setattr(
        TaskEncoder,
        "__call__",
        lambda self, task: real(self, task)._replace(raw_bytes=os.getpid()),
    )
    batches = [[Block(b"%d " % number, True, True)] for number in range(60)]
    expected = [real(work_of(load("bytes")), task).tokens.tolist() for task in tasks_of(batches)]
    with on_processes(work_of(load("bytes")), 2) as encode:
        for encoded, tokens in zip(encode(tasks_of(batches)), expected, strict=True):
            assert encoded.tokens.tolist() == tokens
            pids.append(encoded.raw_bytes)
    assert len(set(pids)) > 4
    assert wait_for(lambda: not any(map(is_alive, pids)))


def test_encoding_processes_end_with_their_parent(tmp_path, write_documents, start):
    """The parent is killed while it tokenizes."""
    write_documents(tmp_path / "corpus", TEXTS)
    os.mkfifo(tmp_path / "pipe")
    arguments = ["tokenize", "corpus", "pipe", "--tokenizer", "bytes", "--workers", "3"]
    changes = {"pretrain_cli.data.tokenizing.pipeline.TASK_BYTES": 3000}
    with start(arguments, tmp_path, changes) as process, (tmp_path / "pipe").open("wb"):
        # the parent waits for the pipe, and the workers wait for the parent
        children = wait_for(
            lambda: (found := children_of(process.pid)) and len(found) == 3 and found
        )
        process.kill()
        process.wait()
        assert wait_for(lambda: not any(map(is_alive, children)))


def wait_for(condition):
    for _ in range(200):
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError


def children_of(process):
    return [int(child) for child in
            Path(f"/proc/{process}/task/{process}/children").read_text().split()]  # fmt: skip


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
