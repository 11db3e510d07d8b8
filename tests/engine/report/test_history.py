"""A run folder in memory: gaps, damaged lines, time over restarts, thinned curves."""

import pytest

from pretrain_cli.engine.report.history import BUCKETS, read_history
from tests.commands.test_report import Page, make_run, step


def test_nonfinite_numbers_become_gaps_and_marks(pretrain, tmp_path):
    make_run(tmp_path / "r", [step(1), step(2, loss=float("nan")), step(3, loss=float("inf"))])
    assert pretrain("report r").code == 0
    (run,) = Page("r/report.html").data["runs"]
    assert run["steps"]["values"]["loss"] == [5.0, None, None]
    marks = [(mark["kind"], mark["step"], mark["text"]) for mark in run["marks"]]
    assert marks == [("not finite", 2, "loss nan"), ("not finite", 3, "loss inf")]


def test_damaged_lines_are_skipped_and_counted_in_a_note(pretrain, tmp_path):
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


def test_time_accumulates_over_processes_that_each_start_at_zero(tmp_path):
    rows = [step(1, seconds=2.0), step(2, seconds=5.0), step(3, seconds=1.0), step(4, seconds=2.5)]
    history = read_history(make_run(tmp_path / "r", rows))
    assert history.steps.axes["time"].tolist() == [2.0, 5.0, 6.0, 7.5]
    assert [mark.axes["step"] for mark in history.marked("restarted")] == [2]


def test_a_long_run_is_thinned_to_means_with_lows_and_highs(pretrain, tmp_path):
    count = 10 * BUCKETS
    losses = [2.0 + (number % 7) for number in range(count)]
    losses[4321] = 99.0  # a single spike
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
