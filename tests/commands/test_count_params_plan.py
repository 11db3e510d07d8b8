"""`pretrain count-params --plan`: memory, time and disk of a run before it starts."""

import json

import pytest

from pretrain_cli.engine.benchmark import rounds, timing
from tests.commands.test_count_params import GEMMA_UNTIED


def test_a_plan_has_memory_by_part_the_micro_batch_time_and_disk(pretrain):
    outcome = pretrain("count-params --plan --tokens 5B --device h200 --gpus 8")
    assert outcome.code == 0, outcome.err
    for part in ("weights", "gradients", "moments", "activations", "logits", "most at once"):
        assert part in outcome.out
    for said in (
        "on 8 × H200: bfloat16",
        "a copy on each (ddp)",
        "a part on each (fsdp)",
        "that a run may take",
        "5B tokens in 44m43s",  # 5e9 × 1.698 GFLOP / (0.4 × 8 × 989 TFLOP/s)
        "at an MFU of 40%, assumed, of 989 TFLOP/s, as the maker states",
        "A checkpoint takes 3.2 GB, and all that are there at a time 12.9 GB",
        "keys and values 11.0 MB for a text of 1,024 tokens",
    ):
        assert said in outcome.out


def test_a_plan_as_json(pretrain):
    line = "count-params --plan --device a100 --mfu 0.5 --micro-batch-size 3 --untied --json"
    plan = json.loads(pretrain(line).out)
    assert plan["parameters"] == GEMMA_UNTIED
    assert plan["tokens"] == 20 * GEMMA_UNTIED
    way = plan["ways"]["alone"]
    assert (way["micro_batch_size"], way["fits"]) == (3, True)
    moments = way["memory"]["moments"]
    assert way["memory"]["peak"] == max(sum(parts.values()) for parts in moments.values())
    assert moments["step"]["weights"] == moments["step"]["gradients"] == 4 * GEMMA_UNTIED
    assert plan["pace"]["mfu"] == 0.5
    assert plan["seconds"] == plan["tokens"] / plan["pace"]["tokens_per_second"]


def test_a_plan_reports_a_micro_batch_that_does_not_fit(pretrain):
    outcome = pretrain("count-params --plan --model qwen3-8b --device h100")
    assert outcome.code == 0, outcome.err
    assert "Micro-batch 1 does not fit: it takes 131.2 GB, more than the 71.5 GB" in outcome.out


def test_a_cpu_plan_offers_to_calibrate_and_calibrates(pretrain, monkeypatch):
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.01)
    here = lambda name, speed, folder, *arguments: getattr(timing, name)(*arguments)  # noqa: E731
    monkeypatch.setattr(rounds, "run_timing", here)
    line = "count-params --plan --model qwen3-tiny --vocab-size 500 --seq-len 32 --tokens 1M"
    outcome = pretrain(line)
    assert "1M tokens: time not known; --calibrate times real steps" in outcome.out
    assert "the program and its libraries" in outcome.out
    plan = json.loads(pretrain(f"{line} --micro-batch-size 2 --calibrate --json").out)
    assert plan["pace"]["source"].startswith("measured on ")
    assert plan["pace"]["source"].endswith(", 2 × 32 tokens a step")
    assert plan["seconds"] == pytest.approx(1e6 / plan["pace"]["tokens_per_second"])
    assert 0 < plan["pace"]["mfu"] < 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model gema3", "model: 'gema3' is not a model or a YAML file; did you mean gemma3?"),
        ("--model nowhere.yaml", "model: no file nowhere.yaml"),
        ("--vocab-size 0", "--vocab-size: 0 is not above zero"),
        ("--seq-len 0", "--seq-len: 0 is not from 1 to the model's 32,768 positions"),
        ("--seq-len 40000", "--seq-len: 40,000 is not from 1 to the model's 32,768 positions"),
        ("--tokens 5B", "--tokens: goes with --plan"),
        ("--no-compile", "--compile: goes with --plan"),
        ("--calibrate", "--calibrate: goes with --plan"),
        ("--plan --tokens 5X", "--tokens: '5X' is not a number such as 5B or 200M"),
        ("--plan --device h300", "--device: 'h300' is not cpu, cuda, cuda:N, mps or one of b200, "),
        ("--plan --device cpu --gpus 2", "--gpus: 2 of a machine without any"),
        ("--plan --gpus 0", "--gpus: 0 is not at least 1"),
        ("--plan --micro-batch-size 0", "--micro-batch-size: 0 is not at least 1"),
        ("--plan --mfu 0", "--mfu: 0 is not above 0 and at most 1"),
        ("--plan --mfu 1.1", "--mfu: 1.1 is not above 0 and at most 1"),
        ("--plan --mfu 0.5 --calibrate", "--mfu: 0.5 is what --calibrate measures; give one"),
        ("--plan --device h200 --calibrate", "--calibrate: times steps on the device that is here"),
        ("--plan --dtype float8 --device a100", "speed.dtype: 'float8' can't be used: A100 does"),
        ("--plan --dtype float8 --device cpu", "speed.dtype: 'float8' can't be used: it is for"),
        ("--plan --dtype int8", "speed.dtype: 'int8' is not one of auto, float32, bfloat16"),
    ],
)
def test_invalid_count_params_options_are_refused(refused, options, said):
    assert refused(f"count-params {options}").startswith(said)
