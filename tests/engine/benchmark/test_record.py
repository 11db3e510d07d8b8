"""Results as files: read back, compared, as Markdown and as a picture."""

import copy
import json
import subprocess

import pytest
import torch

import pretrain_cli
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark import render
from pretrain_cli.engine.benchmark.record import commit, compare, record
from pretrain_cli.engine.benchmark.render import to_markdown
from pretrain_cli.engine.benchmark.rounds import Rounds
from pretrain_cli.engine.benchmark.timing import Round
from pretrain_cli.engine.benchmark.workload import Arm, Repeats, Workload
from pretrain_cli.engine.runtime.peak_flops import Peak
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.model.presets import preset


def start(name, speed, folder, *arguments):
    """Steps of 0.2 s and losses of 2.5; of the arm called wrong, 2.0."""
    if name == "measure_peak":
        return Peak(2e11, "measured, 512³ matrix product in float32", 2e11)
    arm, device = arguments[0], torch.device("cpu")
    return Round(
        tokens=arm.workload.tokens,
        times=[0.2, 0.2],
        warmup=[1.0],
        losses=[3.0, 2.0 if arm.name == "wrong" else 2.5],
        gradient_norms=[1.0, 1.0],
        peak_memory=3_000_000_000,
        warmup_peak_memory=3_000_000_000,
        speed=resolve_speed(speed, device).record(),
    )


@pytest.fixture(scope="module")
def made():
    workload = Workload(
        name="qwen3-tiny", model=preset("qwen3-tiny"), seq_len=50, micro_batch_size=2, device="cpu"
    )
    plain = SpeedConfig(dtype="float32", attention="eager", compile=False)
    arms = [
        Arm(name="first", workload=workload, speed=plain),
        Arm(name="wrong", group="alone on", workload=workload, speed=plain, same_as="first"),
        Arm(name="tf32", workload=workload, speed=plain, left_out="it has no effect here"),
    ]
    rounds = Rounds(arms, Repeats(rounds=1, steps=2, warmup=1), start=start)
    list(rounds.go())
    return json.loads(json.dumps(record(rounds, "ablate", "pretrain benchmark --ablate")))


def test_a_record_says_what_where_and_with_which_settings(made):
    assert made["command"] == "pretrain benchmark --ablate"
    assert made["machine"]
    assert made["pretrain"] == pretrain_cli.__version__
    assert made["peaks"]["float32"]["flops"] == 2e11
    first = made["results"][0]
    assert first["figures"]["tokens_per_second"] == 500.0
    assert first["speed"]["attention"] == {"asked": "eager", "in_force": "eager"}
    assert first["workload"]["model"]["hidden_size"] == 192
    assert first["rounds"][0]["times"] == [0.2, 0.2]


def test_the_commit_is_the_checkouts():
    root = pretrain_cli.__path__[0] + "/.."
    head = subprocess.run(
        ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert commit().removesuffix(" with changes") == head


def test_of_two_records_ratios_and_differences_are_told(made):
    other = copy.deepcopy(made)
    other["torch"] = "9.9"
    result = other["results"][0]
    result["figures"] |= {"tokens_per_second": 1000.0, "peak_memory": 1_500_000_000, "loss": 2.6}
    result["speed"]["attention"] = {"asked": "sdpa", "in_force": "sdpa"}
    result["workload"]["seq_len"] = 60
    del other["results"][1]
    found = compare(made, other)
    (beside,) = found.arms
    assert (beside.arm, beside.tokens_per_second, beside.peak_memory) == ("first", 2.0, 0.5)
    assert beside.loss == (2.5, 2.6)
    assert f"torch: {made['torch']} → 9.9" in found.differences
    assert "speed.attention: eager → sdpa" in found.differences
    assert "workload.seq_len: 50 → 60" in found.differences
    assert len(found.differences) == 3
    assert found.unmatched == ["wrong", "tf32"]


def test_a_record_beside_itself_differs_in_nothing(made):
    found = compare(made, made)
    assert found.differences == []
    assert {beside.tokens_per_second for beside in found.arms} == {1.0}


def test_markdown_has_the_command_a_row_an_arm_and_what_differs(made):
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
def test_a_picture_is_titled_by_what_its_arms_share(others, title):
    workload = {"name": "tiny", "micro_batch_size": 2, "seq_len": 32}
    results = [{"workload": workload}, {"workload": workload | others}]
    record = {"results": results, "machine": "here", "cut_short": ""}
    assert render._title(record) == title
    assert render._title(record | {"cut_short": "SIGINT"}) == f"{title}, cut short by SIGINT"


def test_what_was_cut_short_is_told_as_that(made):
    assert made["cut_short"] == ""
    cut = made | {"cut_short": "SIGTERM"}
    assert "Cut short by SIGTERM." in to_markdown(cut).splitlines()
    assert "ut short" not in to_markdown(made)
    assert compare(made, cut).differences == ["the second was cut short by SIGTERM"]
