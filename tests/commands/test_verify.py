"""`pretrain verify`: a folder is the same model in transformers' hands, or exit 1."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

CHECKPOINT = "runs/tiny/checkpoints/step-000060"
SHORT = "--windows 2 --seq-len 40 --greedy 8"


def verdict(pretrain, line, code=0):
    outcome = pretrain(f"verify {line} {SHORT} --json")
    assert outcome.code == code, (outcome.out, outcome.err)
    return json.loads(outcome.out)


def changed(change):
    """A copy of the checkpoint's model folder, its tensors changed."""
    shutil.copytree(CHECKPOINT, "other", ignore=shutil.ignore_patterns("training"))
    path = Path("other/model.safetensors")
    save_file(
        {name: change(name, value) for name, value in load_file(path).items()},
        path,
        metadata={"format": "pt"},
    )


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("data", ["", "--data data/corpus"], ids=["random", "dataset"])
def test_a_checkpoint_is_the_same_model_in_transformers(pretrain, data):
    found = verdict(pretrain, data)
    assert found["passed"]
    assert found["source"] == (data.removeprefix("--data ") or "random tokens")
    assert found["tokens"] == 80
    assert found["logits"] < found["tolerance"] == 1e-4
    assert found["loss"] == pytest.approx(found["their_loss"], rel=1e-5)
    assert found["agreed"] == found["greedy"] == 8
    assert found["text"] == found["their_text"]


@pytest.mark.usefixtures("trained")
def test_rounded_weights_pass_to_the_tolerance_of_their_type(pretrain):
    changed(lambda name, value: value.to(torch.bfloat16))
    found = verdict(pretrain, f"{CHECKPOINT} --against other --data data/corpus")
    assert 1e-4 < found["logits"] < found["tolerance"] == 5e-2
    assert verdict(pretrain, "other")["tolerance"] == 1e-4  # with itself


@pytest.mark.usefixtures("trained")
def test_another_models_weights_do_not_pass(pretrain):
    changed(lambda name, value: value + 0.05 if "layers.1.post_feedforward" in name else value)
    found = verdict(pretrain, f"{CHECKPOINT} --against other", code=1)
    assert not found["passed"]
    assert found["logits"] > 1e-4
    outcome = pretrain(f"verify {CHECKPOINT} --against other {SHORT}")
    assert outcome.code == 1
    assert "Not the same to a tolerance of 0.0001" in outcome.out


@pytest.mark.usefixtures("trained")
def test_weights_that_transformers_would_draw_at_random_are_refused(pretrain, refused):
    changed(lambda name, value: value)
    tensors = load_file("other/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, "other/model.safetensors", metadata={"format": "pt"})
    message = refused(f"verify {CHECKPOINT} --against other {SHORT}")
    assert "transformers misses 1 tensors, model.layers.1.mlp.up_proj.weight" in message


@pytest.mark.usefixtures("trained")
def test_without_transformers_one_line_says_how_to_install_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'pretrain[verify]'" in refused(f"verify {SHORT}")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--windows 0", "--windows: 0 is not at least 1"),
        ("--seq-len 1", "--seq-len: 1 is not at least 2"),
        ("--seq-len 5000", "--seq-len: 5,000, and the model has 2,048 positions"),
        ("--data nowhere", "nowhere: no such dataset"),
        ("--against nowhere", "nowhere: no such run"),
    ],
)
def test_what_can_not_be_compared_is_refused(refused, line, said):
    assert refused(f"verify {line}").startswith(said)
