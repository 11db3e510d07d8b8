"""Charts: curves of several runs, notes on missing ones, fields of later versions."""

import re

from tests.commands.test_report import Page, html, make_run, step


def test_several_runs_share_charts_under_distinct_names(pretrain, tmp_path):
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


def test_charts_report_missing_curves(pretrain, tmp_path):
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


def test_reserved_memory_is_drawn_and_named_beside_the_allocated(pretrain, tmp_path):
    make_run(tmp_path / "r", [step(1, memory=2 * 10**9, memory_reserved=3 * 10**9)])
    assert pretrain("report r").code == 0
    page = Page("r/report.html")
    assert [c["what"] for c in page.chart("Memory")["curves"]] == ["used", "reserved"]
    assert "peak reserved memory" in page.text
    assert "3.0 GB" in page.text


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
