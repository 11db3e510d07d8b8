"""Checkpoints: transformers opens them, checksums find damage, and shards equal a single file."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.evaluation.evaluate_checkpoint import EvaluateRequest, evaluate_checkpoint
from pretrain_cli.engine.runs import checkpoint, retention
from pretrain_cli.engine.runs.events import Evaluation, StepMetrics
from pretrain_cli.engine.runtime.speed import build_model, resolve_speed
from pretrain_cli.engine.sampling.sample import open_for_sampling
from pretrain_cli.errors import CheckpointError, ConfigError
from pretrain_cli.model.formats.hf_config import read_config
from pretrain_cli.model.formats.hf_weights import load_weights
from tests.engine.training.test_resume import numbers, resume

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["gemma3-tiny", "qwen3-tiny"])
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_transformers_opens_a_checkpoint_with_equal_logits_and_ids(
    settings, run, tmp_path, model, shard
):
    transformers = pytest.importorskip("transformers")
    run(settings(model__name=model, train__max_shard_size=shard))
    folder = tmp_path / "run/checkpoints/step-000006"
    assert (folder / "model.safetensors").exists() == (shard == "5GB")
    sizes = [path.stat().st_size for path in folder.glob("model-*.safetensors")]
    assert len(sizes) > 3 or shard == "5GB"
    assert all(size < 70_000 for size in sizes)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = build_model(read_config(folder), resolve_speed(SpeedConfig(dtype="float32"), CPU), CPU)
    load_weights(ours, folder)
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the cat")["input_ids"] == list(b"the cat")
    assert tokenizer.eos_token == "<|endoftext|>"
    assert theirs.generation_config.eos_token_id == 256


def test_init_from_a_model_folder_starts_at_its_loss(settings, run, tmp_path):
    first = run(settings(train__steps=40, train__eval_every=40))
    folder = tmp_path / "run/checkpoints/step-000040"
    again = run(settings("second", model__init_from=folder))
    [evaluation] = [event for event in first if isinstance(event, Evaluation)]
    start = next(event.loss for event in again if isinstance(event, StepMetrics))
    assert start == pytest.approx(evaluation.loss, abs=0.7)
    assert start < 3.0  # a new model starts at ln 320 = 5.8


@pytest.mark.parametrize(
    "victim",
    ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json",
     "model-00003-of-00006.safetensors"],
)  # fmt: skip
def test_sampling_refuses_a_checkpoint_with_one_flipped_byte(settings, run, tmp_path, victim):
    shard = "5GB" if victim == "model.safetensors" else "60KB"
    run(settings(train__steps=1, train__max_shard_size=shard))
    folder = tmp_path / "run/checkpoints/step-000001"
    data = bytearray((folder / victim).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / victim).write_bytes(bytes(data))
    assert victim in (checkpoint.find_damage(folder) or "")
    with pytest.raises(CheckpointError, match=victim):
        open_for_sampling(folder, device="cpu", dtype="float32", notify=print)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "checksums.json"])
def test_a_flipped_byte_in_training_state_falls_back_to_an_older_save(
    settings, run, tmp_path, name
):
    run(settings(train__checkpoint_every=2))
    folder = tmp_path / "run/checkpoints/step-000006"
    path = folder / "training" / name
    data = bytearray(path.read_bytes())
    for place in (0, len(data) // 2, len(data) - 1):
        data[place] ^= 1
        path.write_bytes(bytes(data))
        told = []
        assert retention.newest_intact(tmp_path / "run", told.append).name == "step-000004"
        assert "step-000006/" in told[0]
        data[place] ^= 1
    path.write_bytes(bytes(data))
    assert checkpoint.find_damage(folder) is None


@pytest.mark.parametrize("size", ["5XB", "0GB", "GB", 5, 5.0])
def test_an_invalid_max_shard_size_is_refused(settings, size):
    with pytest.raises(ConfigError, match=r"train.max_shard_size: .* is not a size such as 5GB"):
        settings(train__max_shard_size=size)


def test_a_sharded_checkpoint_is_resumed_evaluated_and_sampled(settings, run, tmp_path):
    common = {"train__eval_every": 3}
    run(settings("whole", **common))
    run(settings("parts", train__max_shard_size="60KB", train__checkpoint_every=3, **common))
    shutil.rmtree(tmp_path / "parts/checkpoints/step-000006")
    events = resume(run, tmp_path / "parts")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    last = tmp_path / "parts/checkpoints/step-000006"
    parts = {}
    for path in last.glob("model-*"):
        parts |= load_file(path)
    whole = load_file(tmp_path / "whole/checkpoints/step-000006/model.safetensors")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    [evaluation] = [event for event in events if isinstance(event, Evaluation)]
    found = evaluate_checkpoint(EvaluateRequest(where=tmp_path / "parts", device="cpu"), print)
    assert found.evaluation.loss == pytest.approx(evaluation.loss, rel=1e-6)
    sampled = [
        open_for_sampling(where, device="cpu", dtype="float32", notify=print)[1].state_dict()
        for where in (last, tmp_path / "whole")
    ]
    assert all(torch.equal(sampled[0][name], sampled[1][name]) for name in sampled[1])
