"""`pretrain report`: the page has the numbers of the files, and loads no external resource."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml


class Page(HTMLParser):
    """Parsed page: elements, their text, and the scripts that a browser would run."""

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
    """Write a run folder by hand."""
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
    # an evaluation has the token count of its step
    tokens = [128 * row["step"] for row in rows["evaluation"]]
    assert run["evaluations"]["axes"]["tokens"] == tokens
    assert [curve["what"] for curve in page.chart("Loss")["curves"]] == ["training", "validation"]
    assert f"{rows['evaluation'][-1]['loss']:.4f}" in page.text
    sample = json.loads(Path("runs/tiny/samples.jsonl").read_text())["text"]
    assert sample in page.inside("pre")
    # settings as given and as resolved
    assert "asked: auto" in page.text
    assert "0.01" in page.inside("td")


@pytest.mark.usefixtures("trained")
def test_a_restart_is_marked_at_its_step(pretrain):
    assert pretrain("train --resume runs/tiny --steps 64").code == 0
    assert pretrain("report runs/tiny").code == 0
    marks = Page("runs/tiny/report.html").data["runs"][0]["marks"]
    (mark,) = (mark for mark in marks if mark["shown"])
    assert (mark["kind"], mark["step"], mark["tokens"]) == ("restarted", 60, 60 * 128)
    assert mark["text"] == "steps 64"  # the only changed setting


# --- isolation -----------------------------------------------------------------------------------


def test_the_page_loads_no_external_resource(pretrain, tmp_path):
    make_run(tmp_path / "r", [step(1)])
    assert pretrain("report r").code == 0
    text = html("r/report.html")
    assert not re.search(
        r"(https?:)?//(?!www\.w3\.org/2000/svg|github\.com/leeoniya/uPlot)\w[\w.]*\.\w+/", text
    )
    assert "default-src 'none'" in text
    assert not [a for _, a in Page("r/report.html").tags if {"src", "href", "style"} & a.keys()]


def test_the_security_policy_has_the_script_and_style_hashes(pretrain, tmp_path):
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


def test_report_loads_no_torch_matplotlib_or_transformers(pretrain, tmp_path):
    make_run(tmp_path / "r", [step(1)])
    script = (
        "import sys\nfrom pretrain_cli.cli import app\n"
        "app(['report', 'r'], standalone_mode=False)\n"
        "sys.exit([n for n in ('torch', 'matplotlib', 'transformers') if n in sys.modules] or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- PNG -----------------------------------------------------------------------------------------


def test_png_without_matplotlib_is_refused(refused, monkeypatch, tmp_path):
    make_run(tmp_path / "r", [step(1)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused("report r --png c.png") == (
        "--png: matplotlib is not installed; pip install 'pretrain[plot]', or leave --png out"
    )


# --- refused -------------------------------------------------------------------------------------


def test_report_without_any_run_is_refused(refused):
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
def test_invalid_runs_and_output_paths_are_refused(refused, tmp_path, line, said):
    make_run(tmp_path / "r", [step(1)])
    make_run(tmp_path / "damaged", [])
    (tmp_path / "damaged/run.yaml").write_text("settings: [")
    (tmp_path / "folder/d.html").mkdir(parents=True)
    assert refused(f"report {line}").startswith(said)


def html(path):
    return Path(path).read_text()


def quoted(name):
    return "'" + name.replace("'", "'\\''") + "'"
