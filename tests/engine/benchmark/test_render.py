"""A record as Markdown and as a picture."""

import pytest

from pretrain_cli.engine.benchmark import render
from pretrain_cli.engine.benchmark.record import compare
from pretrain_cli.engine.benchmark.render import to_markdown
from tests.engine.benchmark import test_record

made = test_record.made  # a fixture


def test_markdown_has_the_command_a_row_per_arm_and_differences(made):
    lines = to_markdown(made).splitlines()
    assert lines[1] == "pretrain benchmark --ablate"
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    cells = {row[0].strip("|* "): row[1:] for row in rows}
    assert cells["first"][:3] == ["200 ms", "200 – 200", "500"]
    assert cells["first"][6:8] == ["3.0 GB", "2.5000"]
    assert cells["tf32"][0] == "not run"
    assert cells["wrong"][0] == "**200 ms**"
    assert any(
        line.startswith("- wrong differs from first: loss 0.2 of its size") for line in lines
    )
    assert "- tf32: not run: it has no effect here" in lines
    assert "*alone on*" in {row[0].strip("| ") for row in rows}
    assert {len(row) for row in rows} == {11}


@pytest.mark.parametrize(("name", "begins"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml")])
def test_a_picture_is_drawn(made, tmp_path, name, begins):
    pytest.importorskip("matplotlib")
    from pretrain_cli.engine.benchmark.render import draw

    draw(made, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize(
    ("others", "title"),
    [
        ({}, "tiny, 2 × 32 tokens a step on here"),
        ({"seq_len": 64}, "tiny on here"),
        ({"name": "small"}, "2 × 32 tokens a step on here"),
        ({"name": "small", "seq_len": 64}, "Training steps on here"),
    ],
)
def test_a_picture_title_has_the_settings_that_all_arms_share(others, title):
    workload = {"name": "tiny", "micro_batch_size": 2, "seq_len": 32}
    results = [{"workload": workload}, {"workload": workload | others}]
    record = {"results": results, "machine": "here", "cut_short": ""}
    assert render._title(record) == title
    assert render._title(record | {"cut_short": "SIGINT"}) == f"{title}, cut short by SIGINT"


def test_markdown_and_comparison_report_an_interrupted_benchmark(made):
    assert made["cut_short"] == ""
    cut = made | {"cut_short": "SIGTERM"}
    assert "Cut short by SIGTERM." in to_markdown(cut).splitlines()
    assert "ut short" not in to_markdown(made)
    assert compare(made, cut).differences == ["the second was cut short by SIGTERM"]
