"""metrics.jsonl: a line for each event; steps and seconds continue over restarts."""

import json

import pytest

from pretrain_cli.config.build import build_config
from pretrain_cli.engine.runs.run_yaml import read_record, resumed_settings


def test_each_start_has_a_line_and_counters_continue_on_resume(settings, run, tmp_path):
    run(settings(train__steps=2))
    folder = tmp_path / "run"
    record = read_record(folder)
    changed = build_config(record.settings, {"train.steps": 4}, [])
    run(resumed_settings(record, changed), resume=(folder, record))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    starts = [row for row in rows if row["kind"] == "start"]
    assert [row["step"] for row in starts] == [0, 2]
    for row in starts:
        assert row["peak_source"].startswith("measured, ")
        assert row["peak_flops"] == row["peak_measured"] > 0
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    seconds = [row["seconds"] for row in steps]
    assert seconds == sorted(seconds)
    for row in steps:
        assert row["run_tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
