"""Encoding: blocks of text become tokens in the same order for any number of processes."""

import gc
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain_cli.data.tokenizing import encoding, pipeline
from pretrain_cli.data.tokenizing.encoding import Block, Encoder, encoders
from pretrain_cli.errors import DataError

DTYPE = np.dtype("<u4")
TEXTS = [f"Text {number}: {'äöü and words, ' * (number % 50)}\n" for number in range(300)]


@pytest.fixture
def busy(monkeypatch):
    """Split a small corpus into many batches, and use several processes for it."""
    monkeypatch.setattr(pipeline, "SMALL", 0)
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 3000)
    monkeypatch.setattr(pipeline, "BLOCK_CHARACTERS", 2000)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2", "llama2"])
def test_a_batch_is_encoded_by_block_with_document_marks(load, kind):
    tokenizer = load(kind)
    blocks = [Block(b"One.", True, True), Block(b"Two, ", True, False), Block(b"", True, True)]
    tokens, counts = Encoder(tokenizer, DTYPE)(blocks)
    assert tokens.dtype == DTYPE
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    one, two = (tokenizer.backend.encode(text, add_special_tokens=False).ids
                for text in ("One.", "Two, "))  # fmt: skip
    parts = [[*begin, *one, tokenizer.eos], [*begin, *two], [*begin, tokenizer.eos]]
    assert tokens.tolist() == [token for part in parts for token in part]
    assert counts == list(map(len, parts))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_are_returned_in_their_order(load, workers):
    """Batches take different times."""
    batches = [[Block(b"%d " % number * (number % 7 * 100), True, True)] for number in range(40)]
    encode = Encoder(load("bytes"), DTYPE)
    expected = [encode(batch).tokens.tolist() for batch in batches]
    with encoders(load("bytes"), DTYPE, workers) as several:
        assert [encoded.tokens.tolist() for encoded in several(iter(batches))] == expected


def dirtied(batch):
    """Return the bytes of shared memory that a garbage collection in a worker process writes to."""

    def private():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "Private_Dirty" in line)

    before = private()
    gc.collect()
    return private() - before


@pytest.mark.skipif(
    encoding.START != "fork" or not Path("/proc/self/smaps_rollup").is_file(),
    reason="nothing is shared, or it can't be told",
)
def test_memory_shared_with_workers_survives_garbage_collection(load, monkeypatch):
    monkeypatch.setattr(encoding, "_encode", dirtied)
    shared = [[] for _ in range(500_000)]  # 36 MB
    with encoders(load("bytes"), DTYPE, 2) as several:
        (written,) = several(iter([[]]))
    assert written < 5_000_000
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
    with encoders(load("bytes"), DTYPE, 2) as encode:
        encoded = list(encode([[Block(text, True, True)] for text in texts]))
    assert [batch.tokens.tolist() for batch in encoded] == [[*text, 256] for text in texts]


def test_cores_are_counted_on_systems_without_cpu_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert encoding.cores() == os.cpu_count()


def test_reading_runs_ahead_by_a_few_batches(load):
    """The limit bounds memory, which holds all batches in flight."""
    begun = []

    def batches():
        for number in range(50):
            begun.append(number)
            yield [Block(b"text", True, True)]

    with encoders(load("bytes"), DTYPE, 2) as encode:
        for done, _ in enumerate(encode(batches())):
            assert len(begun) <= done + 2 + encoding.IN_FLIGHT_PER_WORKER * 2


def test_encoders_restore_the_environment(load, monkeypatch):
    for value in (None, "true"):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if value:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        with encoders(load("bytes"), DTYPE, 2) as encode:
            list(encode(iter([[Block(b"text", True, True)]])))
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value


def test_a_killed_encoding_process_is_reported_in_one_line(
    tmp_path, make, write_documents, busy, monkeypatch
):
    """The system kills a process like this when memory runs out."""
    corpus = write_documents(tmp_path / "corpus", [*TEXTS, "end here", *TEXTS])
    real = Encoder.__call__

    def end(self, batch):
        if any(block.text == b"end here" for block in batch):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, batch)

    monkeypatch.setattr(Encoder, "__call__", end)
    with pytest.raises(DataError) as error:
        make(corpus, tmp_path / "made", workers=2)
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


def test_encoding_processes_end_with_their_parent(tmp_path, write_documents, start):
    """The parent is killed while it tokenizes."""
    write_documents(tmp_path / "corpus", TEXTS)
    os.mkfifo(tmp_path / "pipe")
    arguments = ["tokenize", "corpus", "pipe", "--tokenizer", "bytes", "--workers", "3"]
    changes = {"pretrain_cli.data.tokenizing.pipeline.BATCH_BYTES": 3000}
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
