"""Benchmark of sampling: equal work in pretrain and transformers, and the bandwidth limit."""

import pytest
import torch

from pretrain_cli.engine.benchmark.sample import copy_rate, measure, step_bytes
from pretrain_cli.engine.benchmark.sample_arm import Workload
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.config import variant
from pretrain_cli.model.presets import preset


def workload(name="gemma3-tiny", **more):
    settings = {"prompt": 20, "tokens": 12, "batch": 2, "rounds": 1, "device": "cpu",
                "dtype": "float32", "compiled": False}  # fmt: skip
    return Workload(model=preset(name), **settings | more)


@pytest.mark.slow
def test_pretrain_and_transformers_alternate_and_give_equal_tokens():
    told = []
    measured = measure(workload(vs=("transformers",), rounds=2), told.append)
    ours, theirs = measured.results
    assert [result.arm for result in measured.results] == ["pretrain", "transformers"]
    assert theirs.agreed == 12  # all 12 tokens, in float32
    assert len(ours.rounds) == len(theirs.rounds) == 2
    assert theirs.ratio == pytest.approx(
        sum(b[1] / a[1] for a, b in zip(theirs.rounds, ours.rounds, strict=True)) / 2
    )
    assert ours.share_of_limit == pytest.approx(ours.decode_tokens_per_second / measured.limit)
    rounds = [line for line in told if "round" in line]
    assert [line.split(":")[0] for line in rounds] == ["pretrain", "transformers"] * 3


def test_a_decoding_step_reads_the_weights_and_each_kv_cache():
    """Bytes for Qwen 3 0.6B: 596,049,920 weights with the tied head, and 28 layers of 8 key/value
    heads of 128 dimensions. The average cache has 640 tokens: 512 of the prompt, and 256 / 2."""
    small = workload("qwen3-0.6b", dtype="bfloat16", prompt=512, tokens=256, batch=8)
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    weights = 28 * (1024 * 128 * (2 * 16 + 2 * 8) + 3 * 1024 * 3072) + 151_936 * 1024 + norms
    assert step_bytes(small) == 2 * weights + 8 * 28 * 2 * 8 * 128 * 640 * 2
    untied = variant(small.model, {"tie_word_embeddings": False})
    assert step_bytes(Workload(**vars(small) | {"model": untied})) == step_bytes(small)


def test_the_measured_memory_bandwidth_is_plausible():
    assert 1e8 < copy_rate(torch.device("cpu")) < 1e13


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("vllm", "--vs: 'vllm' is not transformers, and not speed.NAME=VALUE"),
        ("speed.compile=true", "--vs speed.compile=true: not NAME=VALUE of one of speed."),
    ],
)
def test_only_transformers_or_a_process_setting_is_a_sampling_arm(arm, said):
    with pytest.raises(ConfigError) as error:
        measure(workload(vs=(arm,)), print)
    assert str(error.value).startswith(said)


def test_a_process_setting_arm_runs_pretrain_with_that_setting():
    arms = ("speed.keep_freed_memory=false",)
    measured = measure(workload(vs=arms, settings=("speed.onednn_matmul=false",)), lambda _: None)
    ours, other = measured.results
    assert (ours.arm, other.arm) == ("pretrain", *arms)
    keeps = [each.speed["keep_freed_memory"] for each in (ours, other)]
    assert [each["asked"] for each in keeps] == ["auto", False]
    assert keeps[1]["in_force"] is False
    for each in (ours, other):
        assert each.speed["onednn_matmul"] == {"asked": False, "in_force": False}
        assert each.speed["passive_threads"]["asked"] == "auto"
    assert other.agreed == 12
    assert other.ratio == pytest.approx(ours.rounds[0][1] / other.rounds[0][1])
