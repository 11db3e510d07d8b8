"""`pretrain report`: the page has the numbers of the files, says what is missing, runs nothing."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from pretrain_cli.engine.report.history import BUCKETS, read_history

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'<!--"


class Page(HTMLParser):
    """A page as a browser takes it apart: elements, their text, and what scripts it would run."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(Path(path).read_text())
        self.close()
        self.data = json.loads(self.inside("script")[0])
        self.text = " ".join("".join(t for tag, t in self.texts if tag != "script").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def inside(self, wanted):
        return [text for tag, text in self.texts if tag == wanted]

    def chart(self, title):
        return next(chart for chart in self.data["charts"] if chart["title"] == title)


def make_run(folder, rows, **record):
    """A run folder of our own making."""
    folder.mkdir(parents=True)
    settings = {"train": {"steps": 10}, "optimizer": {"learning_rate": 0.1}}
    record = {"settings": settings, "asked": settings, "model": {"name": "m"}, **record}
    (folder / "run.yaml").write_text(yaml.safe_dump(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def step(number, **more):
    row = {"kind": "step", "step": number, "seconds": number / 4, "tokens": 100 * number}
    return row | {"loss": 5.0 / number, "gradient_norm": 1.25, "learning_rate": 0.1, **more}


@pytest.mark.usefixtures("trained")
def test_the_page_has_the_numbers_of_the_file(pretrain):
    done = pretrain("report")
    assert (done.code, done.out, done.err) == (0, "Written to runs/tiny/report.html\n", "")
    page = Page("runs/tiny/report.html")
    lines = map(json.loads, Path("runs/tiny/metrics.jsonl").read_text().splitlines())
    rows = {"step": [], "evaluation": [], "start": [], "saved": []}
    for row in lines:
        rows[row["kind"]].append(row)
    (run,) = page.data["runs"]
    for axis, field in (("step", "step"), ("tokens", "tokens"), ("time", "seconds")):
        assert run["steps"]["axes"][axis] == [row[field] for row in rows["step"]]
    for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "memory", "mfu"):
        assert run["steps"]["values"][name] == [row[name] for row in rows["step"]]
    for name in ("loss", "bits_per_byte"):
        assert run["evaluations"]["values"][name] == [row[name] for row in rows["evaluation"]]
    titles = [chart["title"] for chart in page.data["charts"]]
    assert sorted(set(titles)) == sorted(titles)
    assert "Split tokens" not in titles
    # an evaluation is where its step is
    tokens = [128 * row["step"] for row in rows["evaluation"]]
    assert run["evaluations"]["axes"]["tokens"] == tokens
    assert [curve["what"] for curve in page.chart("Loss")["curves"]] == ["training", "validation"]
    assert f"{rows['evaluation'][-1]['loss']:.4f}" in page.text
    sample = json.loads(Path("runs/tiny/samples.jsonl").read_text())["text"]
    assert sample in page.inside("pre")
    # as asked and in force
    assert "asked: auto" in page.text
    assert "0.01" in page.inside("td")


@pytest.mark.usefixtures("trained")
def test_a_restart_is_marked_where_it_was(pretrain):
    assert pretrain("train --resume runs/tiny --steps 64").code == 0
    assert pretrain("report runs/tiny").code == 0
    marks = Page("runs/tiny/report.html").data["runs"][0]["marks"]
    (mark,) = (mark for mark in marks if mark["shown"])
    assert (mark["kind"], mark["step"], mark["tokens"]) == ("restarted", 60, 60 * 128)
    assert mark["text"] == "steps 64"  # and nothing else is another


def test_several_runs_are_side_by_side_under_names_that_differ(pretrain, tmp_path):
    make_run(tmp_path / "a/run", [step(1), step(2)])
    other = {"train": {"steps": 10}, "optimizer": {"learning_rate": 0.5}}
    make_run(tmp_path / "b/run", [step(1)], settings=other)
    done = pretrain("report a/run b/run")
    assert (done.code, done.out) == (0, "Written to report.html\n")
    page = Page("report.html")
    assert [run["name"] for run in page.data["runs"]] == ["a/run", "b/run"]
    curves = page.chart("Loss")["curves"]
    assert [(curve["run"], curve["color"]) for curve in curves] == [(0, 0), (1, 1)]
    assert page.data["runs"][0]["steps"]["values"]["loss"] == [5.0, 2.5]
    differing = re.findall(r'<tr class="differs"><th scope="row">(\w+)<', html("report.html"))
    assert differing == ["learning_rate"]


def test_what_a_run_has_not_is_said(pretrain, tmp_path):
    make_run(tmp_path / "r", [step(1), step(2)])
    make_run(tmp_path / "s", [step(1), {"kind": "evaluation", "step": 1, "loss": 4.5}])
    make_run(tmp_path / "none", [])
    assert pretrain("report r").code == 0
    page = Page("r/report.html")
    assert page.chart("Loss")["missing"] == "metrics.jsonl has no validation loss."
    assert page.chart("Memory")["missing"] == "metrics.jsonl has no memory."
    assert page.chart("Memory")["curves"] == []
    assert "validation loss none in metrics.jsonl" in page.text.replace("lossnone", "loss none")
    assert pretrain("report r s").code == 0
    assert Page("report.html").chart("Loss")["missing"] == "No validation loss: r."
    assert pretrain("report none").code == 0
    missing = Page("none/report.html").chart("Loss")["missing"]
    assert missing == "metrics.jsonl has no training loss. metrics.jsonl has no validation loss."
    (tmp_path / "none/metrics.jsonl").unlink()
    assert pretrain("report none").code == 0


def test_kinds_and_fields_of_a_later_version_are_shown(pretrain, tmp_path):
    rows = [step(1, expert_load=0.5), {"kind": "skipped", "step": 2, "loss": 9.5, "seconds": 1.0},
            {"kind": "rolled_back", "step": 2, "to": 1}, step(2, expert_load=0.75),
            {"kind": "saved", "step": 2}, {"kind": "evaluation", "step": 2, "loss": 2.0,
            "sources": {"web": {"loss": 1.5, "tokens": 7}}}]  # fmt: skip
    make_run(tmp_path / "r", rows)
    assert pretrain("report r").code == 0
    page = Page("r/report.html")
    (run,) = page.data["runs"]
    marks = [(mark["kind"], mark["step"], mark["text"], mark["shown"]) for mark in run["marks"]]
    assert marks == [
        ("skipped", 2, "loss 9.5", True), ("rolled back", 2, "to 1", True), ("saved", 2, "", False),
    ]  # fmt: skip
    assert page.chart("Expert load")["curves"][0]["field"] == "expert_load"
    assert run["steps"]["values"]["expert_load"] == [0.5, 0.75]
    assert [c["what"] for c in page.chart("Validation loss by source")["curves"]] == ["web"]


def test_numbers_that_are_not_finite_are_gaps_and_marked(pretrain, tmp_path):
    make_run(tmp_path / "r", [step(1), step(2, loss=float("nan")), step(3, loss=float("inf"))])
    assert pretrain("report r").code == 0
    (run,) = Page("r/report.html").data["runs"]
    assert run["steps"]["values"]["loss"] == [5.0, None, None]
    marks = [(mark["kind"], mark["step"], mark["text"]) for mark in run["marks"]]
    assert marks == [("not finite", 2, "loss nan"), ("not finite", 3, "loss inf")]


def test_damaged_lines_are_left_out_and_said(pretrain, tmp_path):
    run = make_run(tmp_path / "r", [step(1), step(2)])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "step": true}\n[1]\n\xff\xfe\n{"kind": "step", "st')
    (run / "samples.jsonl").write_text('{"step": 2, "prompt": "a", "text": "b"}\n{"step": 2, "te')
    done = pretrain("report r")
    assert done.code == 0
    notes = ("metrics.jsonl: 4 lines are damaged and left out",
             "samples.jsonl: 1 line is damaged and left out")  # fmt: skip
    assert [f"· r: {note}" for note in notes] == done.out.splitlines()[:2]
    page = Page("r/report.html")
    assert page.data["runs"][0]["steps"]["axes"]["step"] == [1, 2]
    assert all(note in page.text for note in notes)


def test_time_goes_on_where_each_process_counted_from_zero(tmp_path):
    rows = [step(1, seconds=2.0), step(2, seconds=5.0), step(3, seconds=1.0), step(4, seconds=2.5)]
    history = read_history(make_run(tmp_path / "r", rows))
    assert history.steps.axes["time"].tolist() == [2.0, 5.0, 6.0, 7.5]
    assert [mark.axes["step"] for mark in history.marked("restarted")] == [2]


def test_a_long_run_is_drawn_by_means_lows_and_highs(pretrain, tmp_path):
    count = 10 * BUCKETS
    losses = [2.0 + (number % 7) for number in range(count)]
    losses[4321] = 99.0  # one spike among them all
    rows = [{"kind": "step", "step": n + 1, "loss": loss} for n, loss in enumerate(losses)]
    make_run(tmp_path / "r", rows)
    assert pretrain("report r").code == 0
    page = Page("r/report.html")
    steps = page.data["runs"][0]["steps"]
    assert (steps["rows"], steps["rowsTogether"]) == (count, 10)
    ten = [losses[place : place + 10] for place in range(0, count, 10)]
    assert steps["low"]["loss"] == [min(some) for some in ten]
    assert steps["high"]["loss"] == [max(some) for some in ten]
    assert steps["values"]["loss"] == pytest.approx([sum(some) / 10 for some in ten])
    assert steps["axes"]["tokens"] == [None] * BUCKETS


# --- safe ----------------------------------------------------------------------------------------


def test_nothing_that_a_file_holds_is_markup(pretrain, tmp_path):
    name = "a<b>&'\"<script>alert(3)<!--"
    rows = [step(1, **{NASTY: 1.0}), {"kind": NASTY, "step": 1, NASTY: NASTY}]
    settings = {"train": {"steps": NASTY, NASTY: [NASTY]}, NASTY: {NASTY: NASTY}}
    record = {"model": {"name": NASTY}, "dataset": {"path": NASTY}, "speed": {NASTY: NASTY}}
    run = make_run(tmp_path / name, rows, settings=settings, **record)
    sample = {"step": 1, "prompt": NASTY, "text": NASTY + "\u2028\x00%%data%%"}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    make_run(tmp_path / "plain", [step(1)])
    assert pretrain("report plain --out plain.html").code == 0
    done = pretrain(f"report '{name}' --out nasty.html".replace("'" + name + "'", quoted(name)))
    assert done.code == 0, done.err
    plain, nasty = Page("plain.html"), Page("nasty.html")
    assert {tag for tag, _ in nasty.tags} <= {tag for tag, _ in plain.tags} | {"pre", "details",
            "summary", "span", "table", "thead", "td", "small"}  # fmt: skip
    assert [a for t, a in nasty.tags if t == "script"] == [
        a for t, a in plain.tags if t == "script"
    ]
    assert not [a for _, a in nasty.tags if any(key.startswith("on") or key == "src" for key in a)]
    assert nasty.data["runs"][0]["name"] == name
    assert nasty.data["runs"][0]["marks"][0]["kind"] == NASTY.replace("_", " ")
    assert "".join(nasty.inside("span")).count(NASTY) == 1  # the prompt


def test_the_page_reaches_for_nothing(pretrain, tmp_path):
    make_run(tmp_path / "r", [step(1)])
    assert pretrain("report r").code == 0
    text = html("r/report.html")
    assert not re.search(
        r"(https?:)?//(?!www\.w3\.org/2000/svg|github\.com/leeoniya/uPlot)\w[\w.]*\.\w+/", text
    )
    assert "default-src 'none'" in text
    assert not [a for _, a in Page("r/report.html").tags if {"src", "href", "style"} & a.keys()]


def test_the_script_may_run_because_the_policy_names_its_hash(pretrain, tmp_path):
    openssl = ["openssl", "dgst", "-sha256", "-binary"]
    make_run(tmp_path / "r", [step(1)])
    assert pretrain("report r").code == 0
    text = html("r/report.html")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.S)[0]
        digest = subprocess.run(openssl, input=content.encode(), capture_output=True, check=True)
        encoded = subprocess.run(["base64"], input=digest.stdout, capture_output=True, check=True)
        assert f"{directive} 'sha256-{encoded.stdout.decode().strip()}'" in policy


def test_no_torch_is_loaded(pretrain, tmp_path):
    make_run(tmp_path / "r", [step(1)])
    script = (
        "import sys\nfrom pretrain_cli.cli import app\n"
        "app(['report', 'r'], standalone_mode=False)\n"
        "sys.exit([n for n in ('torch', 'matplotlib', 'transformers') if n in sys.modules] or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- the picture ---------------------------------------------------------------------------------


def test_the_picture_is_drawn(pretrain, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    rows = [step(1), step(2), {"kind": "skipped", "step": 2}, {"kind": "evaluation", "step": 2,
            "loss": 2.0}]  # fmt: skip
    make_run(tmp_path / "_$a_{$", rows)  # a name that matplotlib would take for mathematics
    make_run(tmp_path / "名前", [])
    done = pretrain("report '_$a_{$' 名前 --png c.png")
    assert (done.code, done.err) == (0, "")
    assert done.out == "Written to report.html\nWritten to c.png\n"
    with image.open("c.png") as picture:
        assert picture.format == "PNG"
        pixels = picture.convert("RGB")
        blue = (0x1F, 0x5F, 0xD0)  # the first run's curve
        assert any(color == blue for _, color in pixels.getcolors(1 << 24))


def test_without_matplotlib_a_picture_is_refused_in_a_line(refused, monkeypatch, tmp_path):
    make_run(tmp_path / "r", [step(1)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused("report r --png c.png") == (
        "--png: matplotlib is not installed; pip install 'pretrain[plot]', or leave --png out"
    )


# --- refused -------------------------------------------------------------------------------------


def test_no_run_yet(refused):
    assert refused("report").startswith("runs/: no run; train one with 'pretrain train'")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nowhere", "nowhere: no such run; name the folder of a run"),
        ("folder", "folder: not a run (no run.yaml); name the folder of a run"),
        ("damaged", "damaged/run.yaml: damaged; copy it back from a backup"),
        ("r r/", "r: given twice; name each run once"),
        ("r --out r/metrics.jsonl", "--out: r/metrics.jsonl doesn't end in .html"),
        ("r --out folder/d.html", "--out: folder/d.html is a folder"),
        ("r --out no/r.html", "--out: no/r.html is in no folder that exists (no)"),
        ("r --png c.jpg", "--png: c.jpg doesn't end in .png"),
    ],
)
def test_what_is_no_run_or_no_place(refused, tmp_path, line, said):
    make_run(tmp_path / "r", [step(1)])
    make_run(tmp_path / "damaged", [])
    (tmp_path / "damaged/run.yaml").write_text("settings: [")
    (tmp_path / "folder/d.html").mkdir(parents=True)
    assert refused(f"report {line}").startswith(said)


def html(path):
    return Path(path).read_text()


def quoted(name):
    return "'" + name.replace("'", "'\\''") + "'"
