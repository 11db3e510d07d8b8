"""Benchmark records: their contents, and the comparison of two."""

import copy
import json
import subprocess

import pytest
import torch

import pretrain_cli
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.record import commit, compare, record
from pretrain_cli.engine.benchmark.rounds import Rounds
from pretrain_cli.engine.benchmark.timing import Round
from pretrain_cli.engine.benchmark.workload import Arm, Repeats, Workload
from pretrain_cli.engine.runtime.peak_flops import Peak
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.model.presets import preset


def start(name, speed, folder, *arguments):
    """Return a fake result: steps of 0.2 s, and a last loss of 2.5, or 2.0 for the arm "wrong"."""
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


def test_a_record_has_the_command_machine_settings_and_figures(made):
    assert made["command"] == "pretrain benchmark --ablate"
    assert made["machine"]
    assert made["pretrain"] == pretrain_cli.__version__
    assert made["peaks"]["float32"]["flops"] == 2e11
    first = made["results"][0]
    assert first["figures"]["tokens_per_second"] == 500.0
    assert first["speed"]["attention"] == {"asked": "eager", "in_force": "eager"}
    assert first["workload"]["model"]["hidden_size"] == 192
    assert first["rounds"][0]["times"] == [0.2, 0.2]


def test_the_recorded_commit_is_the_head_of_the_checkout():
    root = pretrain_cli.__path__[0] + "/.."
    head = subprocess.run(
        ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert commit().removesuffix(" with changes") == head


def test_comparing_two_records_gives_ratios_and_differences(made):
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


def test_a_record_compared_with_itself_has_no_differences(made):
    found = compare(made, made)
    assert found.differences == []
    assert {beside.tokens_per_second for beside in found.arms} == {1.0}
