"""Fixtures of the tests of text, tokenizers, datasets and batches."""

import functools
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tokenizers

import pretrain_cli
from pretrain_cli.data.corpus.source_files import Corpus
from pretrain_cli.data.shards import Manifest, SplitName, TokenStream
from pretrain_cli.data.tokenizers.tokenizer import HUB, Tokenizer, load_tokenizer, train_bpe
from pretrain_cli.data.tokenizing.progress import Encoding
from pretrain_cli.data.tokenizing.tokenize import Tokenized, TokenizeRequest, tokenize
from pretrain_cli.data.tokenizing.writer import DatasetWriter


class Outcome(NamedTuple):
    """Outcome of a process: its exit code and its output."""

    code: int
    out: str
    err: str


ROOT = str(Path(pretrain_cli.__file__).parent.parent)

# Runs a command line with some constants of the program changed, and sends itself SIGKILL at the
# n-th call of a function. Without arguments, it reads commands as lines of JSON and runs each in a
# fork, because starting Python takes long.
DRIVER = """
import importlib, json, os, signal, sys
import pretrain_cli.data.tokenizing.tokenize
from pretrain_cli.cli import app

os.fsync = lambda file: None  # which takes long too: a process that is killed loses no write

def find(name):
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            place = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:-1]:
            place = getattr(place, part)
        return place, parts[-1]
    raise LookupError(name)

def kill_at(call, real):
    def counted(*given, **named):
        nonlocal call
        call -= 1
        if call <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)
    return counted

def run(arguments, changes, function, call):
    for name, value in changes.items():
        setattr(*find(name), value)
    if function:
        place, name = find(function)
        setattr(place, name, kill_at(call, getattr(place, name)))
    app(arguments)

if sys.argv[1:]:
    run(*json.loads(sys.argv[1]))
for line in sys.stdin:
    folder, place, command = json.loads(line)
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    os.chdir(folder)
    for number, name in enumerate((os.devnull, place + "/out", place + "/err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    run(*command)
"""


@functools.cache
def _loaded(kind: str) -> Tokenizer:
    if kind == "bpe":
        source = "def square(number):\n    return number * number\n\n\nprint(square(12))\n"
        return train_bpe([source * 3, "The quick brown fox, the lazy dog. " * 5], 320)
    return load_tokenizer(kind)


def encode_documents(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return each text's ids with its document marks, encoded whole."""
    before = [] if tokenizer.bos is None else [tokenizer.bos]
    encoded = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    return [[*before, *encoding.ids, tokenizer.eos] for encoding in encoded]


@pytest.fixture(scope="session")
def load() -> Callable[[str], Tokenizer]:
    """Function that returns a tokenizer by name. Published ones are in $PRETRAIN_TOKENIZERS;
    without their file the test is skipped."""

    def tokenizer(kind: str) -> Tokenizer:
        folder = os.environ.get("PRETRAIN_TOKENIZERS", "")
        if kind in HUB and not Path(folder, kind, "tokenizer.json").is_file():
            pytest.skip(f"{kind}: no {kind}/tokenizer.json in $PRETRAIN_TOKENIZERS ('{folder}')")
        return _loaded(kind)

    return tokenizer


@pytest.fixture
def marked(tmp_path: Path) -> Callable[..., Path]:
    """Function that writes a tokenizer file: the tokenizer `bytes` plus <s>, </s> and <sep> as ids
    257 to 259. With `begins`, it puts <s> before every text."""

    def make(*, begins: bool = False) -> Path:
        backend = tokenizers.Tokenizer.from_str(load_tokenizer("bytes").json)
        backend.add_special_tokens(["<s>", "</s>", "<sep>"])
        if begins:
            mark = tokenizers.processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 257)]
            )
            backend.post_processor = mark  # pyright: ignore[reportAttributeAccessIssue]
        backend.save(str(tmp_path / "marked.json"))
        return tmp_path / "marked.json"

    return make


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenStream]:
    """Function that returns a TokenStream over shards with these tokens."""
    folder = tmp_path_factory.mktemp("stream")

    def make(*shards: np.ndarray | range, dtype: str = "uint16") -> TokenStream:
        paths = []
        for number, tokens in enumerate(shards):
            paths.append(folder / f"{number}.bin")
            paths[-1].unlink(missing_ok=True)  # an earlier one may still be mapped
            np.asarray(tokens).astype(np.dtype(dtype).newbyteorder("<")).tofile(paths[-1])
        return TokenStream(paths, dtype)

    return make


@pytest.fixture(scope="session")
def make() -> Callable[..., Tokenized]:
    """Function that tokenizes one corpus or several, by default with the tokenizer `bytes`."""

    def run(corpus: Path | str | Iterable[Path | str], out: Path, **options: Any) -> Tokenized:
        names = (corpus,) if isinstance(corpus, Path | str) else corpus
        request = TokenizeRequest(
            paths=tuple(map(str, names)), out=out, **{"tokenizer": "bytes"} | options
        )
        return tokenize(request, lambda *_: None)

    return run


@pytest.fixture
def fill_pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path, bytes], None]]:
    """Function that makes a named pipe and writes data to it from a process of its own. With a
    thread instead, forked encoders would hold the pipe open, and its reader would wait forever."""
    writers = []

    def fill(path: Path, data: bytes) -> None:
        source = tmp_path_factory.mktemp("pipe") / "source"
        source.write_bytes(data)
        os.mkfifo(path)
        writers.append(subprocess.Popen(["cp", source, path]))

    yield fill
    for writer in writers:
        writer.wait(timeout=60)


DOCUMENTS = [b"first", b"the second one", "drittes – ü".encode(), b"4", b"and the fifth, long"]
HELD_OUT = [b"for validation", b"and this"]


@pytest.fixture(scope="session")
def write() -> Callable[..., Manifest]:
    """Function that writes a dataset of these documents with the tokenizer `bytes`, without a
    corpus."""

    def make(
        folder: Path,
        training: Sequence[bytes] = DOCUMENTS,
        held_out: Sequence[bytes] = HELD_OUT,
        *,
        shard_tokens: int = 10,
    ) -> Manifest:
        request = TokenizeRequest(
            paths=("corpus",), out=folder, tokenizer="bytes", val_fraction=0,
            shard_tokens=shard_tokens,
        )  # fmt: skip
        with DatasetWriter(request, Corpus([]), load_tokenizer("bytes")) as writer:
            writer.begin()
            splits: dict[SplitName, Sequence[bytes]] = {"train": training, "val": held_out}
            for split, documents in splits.items():
                for document in documents:
                    writer.shards.add(split, np.array([*document, 256]), [0])
                    writer.shards.splits[split].bytes += len(document)
            return writer.finish(
                Encoding(encoder="", why_not_gigatoken="", samples_compared=0, bytes_per_second=0)
            )

    return make


@pytest.fixture(scope="session")
def write_documents() -> Callable[[Path, Iterable[str]], Path]:
    """Function that writes each text to a file of its own in a folder, and returns the folder."""

    def write(folder: Path, texts: Iterable[str]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(texts):
            (folder / f"{number:05d}.txt").write_bytes(text.encode())
        return folder

    return write


@pytest.fixture(scope="session")
def read_back() -> Callable[[Path, str], list[list[int]]]:
    """Function that returns the ids of each document of a split, cut at the starts in the index. It
    does not use the package's reader, and it checks all checksums of the dataset."""

    def read(folder: Path, split: str) -> list[list[int]]:
        manifest = json.loads((folder / "dataset.json").read_text())
        named = {shard["file"] for shard in manifest["shards"]}
        assert {path.name for path in folder.glob("*.bin")} == named
        ids: list[int] = []
        starts: list[int] = []
        for shard in manifest["shards"]:
            path = folder / shard["file"]
            data = path.read_bytes()
            index = path.with_suffix(".idx").read_bytes()
            blocks = path.with_suffix(".crc").read_bytes()
            crcs = [zlib.crc32(data[at : at + 65536]) for at in range(0, len(data), 65536)]
            assert np.frombuffer(blocks, "<u4").tolist() == crcs
            for content, key in (
                (data, "sha256"),
                (index, "index_sha256"),
                (blocks, "blocks_sha256"),
            ):
                assert hashlib.sha256(content).hexdigest() == shard[key]
            tokens = np.frombuffer(data, {"uint16": "<u2", "uint32": "<u4"}[manifest["dtype"]])
            begins = np.frombuffer(index, "<u8").astype(int)
            assert (len(tokens), len(begins)) == (shard["tokens"], shard["documents"])
            assert tokens.max() == shard["largest_token"]
            if shard["split"] == split:
                starts += (begins + len(ids)).tolist()
                ids += tokens.tolist()
        assert starts[:1] == ([0] if ids else [])
        return [ids[start:end] for start, end in pairwise([*starts, len(ids)])]

    return read


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, Any]]:
    """Function that returns the content of every file in a folder. For a database, these are its
    rows, because its bytes depend on the number of writes."""

    def read(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.suffix == ".sqlite":
                with closing(sqlite3.connect(path)) as database:
                    found[name] = database.execute("SELECT * FROM seen ORDER BY 1").fetchall()
            elif path.is_file() and path.name != "encoding.json":  # it has the rate
                found[name] = path.read_bytes()
        return found

    return read


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Function that starts `pretrain …` in a new process in a folder, with some constants of the
    program changed, given by name."""

    def run(
        arguments: list[str], folder: Path | None, changes: dict[str, Any]
    ) -> subprocess.Popen[str]:
        command = [json.dumps([arguments, changes, "", 0])] if arguments else []
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, *command],
            cwd=folder, env={**os.environ, "PYTHONPATH": ROOT, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def driven(
    start: Callable[..., subprocess.Popen[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Outcome]]:
    """Function that runs `pretrain …` in a process that is killed at the n-th call of a named
    function."""
    place = tmp_path_factory.mktemp("driven")
    with start([], None, {}) as server:
        assert server.stdin
        assert server.stdout

        def run(
            arguments: list[str],
            folder: Path,
            changes: dict[str, Any],
            killed_at: tuple[str, int] = ("", 0),
        ) -> Outcome:
            print(
                json.dumps([str(folder), str(place), [arguments, changes, *killed_at]]),
                file=server.stdin, flush=True,
            )  # fmt: skip
            code = int(server.stdout.readline())
            return Outcome(code, (place / "out").read_text(), (place / "err").read_text())

        yield run
        server.stdin.close()
