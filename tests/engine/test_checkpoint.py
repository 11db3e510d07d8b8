"""A checkpoint is a model: transformers opens it, and its files can be trusted."""

import json

import pytest
import torch

from pretrain_cli.config import SpeedConfig
from pretrain_cli.engine import checkpoint, keeping
from pretrain_cli.engine.metrics import Evaluation, StepMetrics
from pretrain_cli.engine.sample import open_for_sampling
from pretrain_cli.engine.speed import build_model, resolve_speed
from pretrain_cli.errors import CheckpointError, DataError
from pretrain_cli.model.config_json import read_config
from pretrain_cli.model.huggingface import load_weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["gemma3-tiny", "qwen3-tiny"])
def test_transformers_opens_a_checkpoint_with_the_same_logits_and_tokens(
    settings, run, tmp_path, model
):
    transformers = pytest.importorskip("transformers")
    run(settings(model__name=model))
    folder = tmp_path / "run/checkpoints/step-000006"
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


def test_training_from_a_model_folder_starts_where_it_stands(settings, run, tmp_path):
    first = run(settings(train__steps=40, train__eval_every=40))
    folder = tmp_path / "run/checkpoints/step-000040"
    again = run(settings("second", model__init_from=folder))
    [evaluation] = [event for event in first if isinstance(event, Evaluation)]
    start = next(event.loss for event in again if isinstance(event, StepMetrics))
    assert start == pytest.approx(evaluation.loss, abs=0.7)
    assert start < 3.0  # and not ln 320 = 5.8, where a new model starts


def test_init_from_a_model_of_another_tokenizer_is_refused(settings, run, tmp_path):
    run(settings(train__steps=1))
    folder = tmp_path / "run/checkpoints/step-000001"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="was trained with another"):
        run(settings("second", model__init_from=folder))


@pytest.mark.parametrize("victim", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_checkpoint_with_one_flipped_byte_is_not_sampled_from(settings, run, tmp_path, victim):
    run(settings(train__steps=1))
    folder = tmp_path / "run/checkpoints/step-000001"
    data = bytearray((folder / victim).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / victim).write_bytes(bytes(data))
    assert victim in (checkpoint.damage(folder) or "")
    with pytest.raises(CheckpointError, match=victim):
        open_for_sampling(folder, device="cpu", dtype="float32", report=print)


def test_a_save_that_dies_leaves_the_checkpoints_as_they_were(settings, run, tmp_path, monkeypatch):
    run(settings(train__steps=2))
    real = checkpoint.seal

    def dies(folder):
        real(folder)
        raise OSError("the machine went away")

    monkeypatch.setattr(checkpoint, "seal", dies)
    with pytest.raises(OSError, match="went away"):
        run(settings("second", train__steps=2))
    assert keeping.checkpoints(tmp_path / "second") == []
    assert keeping.newest_intact(tmp_path / "run", print) is not None
