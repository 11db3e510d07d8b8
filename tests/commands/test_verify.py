"""`pretrain verify`: exit 0 if transformers computes the same from a folder, else 1."""

import json
import sys

import pytest

from tests.engine.evaluation.conftest import CHECKPOINT, copy_with_weights

SHORT = "--windows 2 --seq-len 40 --greedy 8"


def verdict(pretrain, line, code=0):
    outcome = pretrain(f"verify {line} {SHORT} --json")
    assert outcome.code == code, (outcome.out, outcome.err)
    return json.loads(outcome.out)


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
def test_changed_weights_fail_verification(pretrain):
    copy_with_weights(
        lambda name, value: value + 0.05 if "layers.1.post_feedforward" in name else value
    )
    found = verdict(pretrain, f"{CHECKPOINT} --against other", code=1)
    assert not found["passed"]
    assert found["logits"] > 1e-4
    outcome = pretrain(f"verify {CHECKPOINT} --against other {SHORT}")
    assert outcome.code == 1
    assert "Not the same to a tolerance of 0.0001" in outcome.out


@pytest.mark.usefixtures("trained")
def test_a_missing_transformers_error_says_how_to_install_it(refused, monkeypatch):
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
def test_invalid_verify_arguments_are_refused(refused, line, said):
    assert refused(f"verify {line}").startswith(said)
