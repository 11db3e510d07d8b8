"""Datasets on the hub: their files are found and streamed, from a local stand-in of the hub."""

import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from pretrain_cli.data.corpus.documents import ReadOptions
from pretrain_cli.data.corpus.hub import CONVERTED, folder_name, hub_files
from pretrain_cli.data.corpus.readers import FileReader
from pretrain_cli.data.corpus.source_files import find_corpus
from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.data.tokenizing import pipeline
from pretrain_cli.data.tokenizing.request import default_folder
from pretrain_cli.errors import DataError

ROW = re.compile(r"/api/datasets/(?P<name>\w+/\w+)/(?P<what>revision|tree)/(?P<revision>[^?]+)")
FILE = re.compile(r"/datasets/(?P<name>\w+/\w+)/resolve/(?P<revision>[^/]+)/(?P<path>[^?]+)")


class Hub(ThreadingHTTPServer):
    """The parts of the hub's protocol that are used: revisions, the tree of files, the files."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        """Files by dataset and branch. A branch's commit is its name, hashed."""
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str, str]] = []
        self.breaks_after = 0
        """Bytes of a file after which its connection breaks, once; 0 for never."""

    @property
    def downloads(self):
        return [path for method, path, _ in self.requests if method == "GET" and "resolve" in path]


def commit_of(branch):
    return f"{sum(map(ord, branch)):040x}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        path = self.path.replace("%2F", "/")
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        match = ROW.fullmatch(path.partition("?")[0]) or FILE.fullmatch(path.partition("?")[0])
        branches = [branch for name, branch in hub.files if match and name == match["name"]]
        if match is None or not branches:
            return self.fail(401, "RepoNotFound")
        asked = match["revision"]
        name = match["name"]
        has = (branch for branch in branches if asked in (branch, commit_of(branch)))
        if (branch := next(has, None)) is None:
            return self.fail(404, "RevisionNotFound")
        files = hub.files[name, branch]
        if "what" not in match.re.groupindex:
            if name in hub.gated:
                return self.fail(403, "GatedRepo")
            return self.send_file(files[match["path"]])
        if match["what"] == "revision":
            return self.answer({"id": name, "sha": commit_of(branch), "siblings": [], "tags": []})
        return self.answer(
            [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
             for path, data in files.items()]
        )  # fmt: skip

    def send_file(self, data):
        first = int(re.sub(r"\D", "", self.headers.get("Range", "")) or 0)
        self.send_response(206 if first else 200)
        self.send_header("ETag", '"etag"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        broken, self.server.breaks_after = self.server.breaks_after, 0
        self.wfile.write(data[first : first + broken] if broken else data[first:])
        self.close_connection = True

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def rows(*texts):
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": list(texts), "id": range(len(texts))}), file)
    return file.getvalue()


@pytest.fixture
def online(monkeypatch):
    """Allow connections; the tests only use this machine's own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch, online):
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        server.files["ann/books", CONVERTED] = {
            "default/train/0000.parquet": rows("one", "two"),
            "default/train/0001.parquet": rows("three"),
            "default/test/0000.parquet": rows("exam"),
            "poems/partial-train/0000.parquet": rows("ode"),
            "poems/train/0000.parquet": rows("sonnet"),
            "drama/test/0000.parquet": rows("act"),
        }
        server.files["ann/books", "main"] = {
            "README.md": b"# Books",
            "train.parquet": rows("of main"),
        }
        server.files["ann/raw", "main"] = {
            "data/train-00000-of-00002-ab12.parquet": rows("a"),
            "data/train-00001-of-00002-ab12.parquet": rows("b"),
            "data/test-00000-of-00001.parquet": rows("c"),
            "sample/10BT/000_00000.parquet": rows("d"),
            "en/train/part.parquet": rows("e"),
        }
        server.files["ann/pictures", "main"] = {"a.png": b"\x89PNG"}
        server.files["ann/many", CONVERTED] = {
            f"{config}/train/0000.parquet": rows(config) for config in ("de", "en")
        }
        yield server
        server.shutdown()


def texts(asked, **options):
    return [
        b"".join(document.blocks).decode()
        for file in find_corpus([asked], **options).files
        for document in FileReader(file, ReadOptions()).documents()
    ]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("hf:ann/books", ["one", "two", "three"]),
        ("hf:ann/books/test", ["exam"]),
        ("hf:ann/books:poems", ["sonnet"]),
        ("hf:ann/books:poems/partial-train", ["ode"]),
        ("hf:ann/books:drama", ["act"]),  # its only split
        ("hf:ann/books@main", ["of main"]),
        ("hf:ann/raw", ["a", "b"]),
        ("hf:ann/raw/test", ["c"]),
        ("hf:ann/raw:sample/10BT", ["d"]),
        ("hf:ann/raw:sample/10BT/train", ["d"]),
        ("hf:ann/raw:en", ["e"]),
        ("hf:ann/many:de", ["de"]),
    ],
)
def test_a_config_and_a_split_name_the_files(hub, asked, expected):
    assert texts(asked) == expected


def test_include_and_exclude_filter_the_files(hub):
    assert texts("hf:ann/books", include=["0001*"]) == ["three"]
    assert texts("hf:ann/books", exclude=["*/0001*"]) == ["one", "two"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("hf:books", "not of the form hf:OWNER/NAME[@REVISION][:CONFIG][/SPLIT]"),
        ("hf:bob/books", "the hub has no such dataset: check the name, or run 'hf auth login'"),
        ("hf:ann/books@v9", "no such revision: check what stands after the @"),
        ("hf:ann/books:poem", "no config 'poem' (it has default, drama, poems); did you mean"),
        ("hf:ann/books/exam", "no split 'exam' (it has test, train)"),
        ("hf:ann/books:poems/x", "no split 'x' (it has partial-train, train)"),
        ("hf:ann/many", "has several configs (de, en); name one with :CONFIG at its end"),
        ("hf:ann/pictures", "no Parquet files in it; get it with 'hf download --repo-type dataset"),
    ],
)
def test_a_name_that_is_not_there_is_refused_in_one_line(hub, asked, said):
    with pytest.raises(DataError) as error:
        hub_files(asked)
    assert str(error.value).startswith(f"{asked}: {said}")
    assert "\n" not in str(error.value)


def test_a_gated_dataset_is_refused_before_any_file_is_read(hub):
    hub.gated.add("ann/books")
    with pytest.raises(DataError) as error:
        hub_files("hf:ann/books")
    assert str(error.value) == (
        "hf:ann/books: is gated: accept its terms on the hub and run 'hf auth login'"
    )
    assert not hub.downloads


def test_offline_mode_is_named():
    with pytest.raises(DataError, match="hf:ann/books: HF_HUB_OFFLINE is set: unset it; or get"):
        hub_files("hf:ann/books")


def test_without_a_connection_the_error_says_what_to_do(monkeypatch, online):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError) as error:
        hub_files("hf:ann/books")
    assert re.fullmatch(
        r"hf:ann/books: the hub can't be reached \(\w+\): run the command again when it can; or "
        "get it with 'hf download --repo-type dataset ann/books --local-dir FOLDER', and give "
        "the folder",
        str(error.value),
    )


def test_a_connection_that_breaks_is_opened_again_where_it_broke(hub):
    many = list(map(str, range(90_000)))
    hub.files["ann/books", CONVERTED]["default/train/0000.parquet"] = rows(*many)
    hub.breaks_after = 200_000
    assert texts("hf:ann/books", include=["*0000*"]) == many
    (again,) = (what for _, _, what in hub.requests if what)
    assert 0 < int(again.removeprefix("bytes=").removesuffix("-")) <= 200_000


def test_a_file_that_is_not_as_long_as_listed_is_refused(hub):
    (file,) = hub_files("hf:ann/books/test")
    hub.files["ann/books", CONVERTED]["default/test/0000.parquet"] = b"PAR1"
    with pytest.raises(DataError, match=rf"{file.location}: not {file.size} bytes, as the hub"):
        list(FileReader(file, ReadOptions()).documents())


def test_a_dataset_records_the_revision_that_it_was_made_from(hub, make, tmp_path, read_back):
    made = make("hf:ann/books", tmp_path / "made", val_fraction=0)
    texts = [bytes(ids[:-1]).decode() for ids in read_back(tmp_path / "made", "train")]
    assert texts == ["one", "two", "three"]
    commit = commit_of(CONVERTED)[:12]
    assert made.manifest.paths == ["hf:ann/books"]
    assert list(made.manifest.sources) == [f"hf:ann/books@{commit}:default/train"]
    lines = (tmp_path / "made/files.jsonl").read_text().splitlines()
    names = [json.loads(line)["name"] for line in lines]
    assert names == [f"ann/books@{commit}/default/train/000{n}.parquet" for n in (0, 1)]
    assert len(open_dataset(tmp_path / "made").train) == 14
    assert make("hf:ann/books", tmp_path / "made", val_fraction=0).was_there


def test_an_interrupted_run_continues_without_reading_files_again(
    hub, make, tmp_path, monkeypatch, read_back
):
    monkeypatch.setattr(pipeline, "TASK_BYTES", 1)
    monkeypatch.setattr(pipeline, "SECONDS_BETWEEN_SAVES", -1)
    files = hub.files["ann/books", CONVERTED]
    texts = [f"{number} of them" for number in range(40)]
    files["default/train/0001.parquet"] = rows(*texts)
    whole = files["default/train/0002.parquet"] = rows("last")
    files["default/train/0002.parquet"] = b"PAR1" + bytes(len(whole) - 4)
    with pytest.raises(DataError, match=r"0002\.parquet: damaged"):
        make("hf:ann/books", tmp_path / "made", val_fraction=0)
    files["default/train/0002.parquet"] = whole
    hub.requests.clear()
    made = make("hf:ann/books", tmp_path / "made", val_fraction=0)
    assert made.resumed
    assert not [path for path in hub.downloads if "0000.parquet" in path]
    found = [bytes(ids[:-1]).decode() for ids in read_back(tmp_path / "made", "train")]
    assert found == ["one", "two", *texts, "last"]


def test_files_are_read_one_at_a_time_when_they_are_needed(hub):
    first, _ = hub_files("hf:ann/books")
    assert not hub.downloads
    list(FileReader(first, ReadOptions()).documents())
    (path,) = hub.downloads
    assert path.endswith("/default/train/0000.parquet")


def test_the_default_folder_has_the_name_of_the_dataset():
    assert default_folder("hf:ann/books") == Path("data/books")
    assert folder_name("hf:ann/books@main/test") == "books"
    assert folder_name("hf:ann/raw:sample/10BT/train") == "raw-sample-10BT-train"
