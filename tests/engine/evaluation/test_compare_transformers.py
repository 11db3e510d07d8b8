"""Comparison with transformers: tolerances, ties, and models that can't be compared."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from pretrain_cli.engine.evaluation.compare_transformers import Comparison, _is_tie, verify
from pretrain_cli.errors import CheckpointError
from pretrain_cli.model.decoder import Decoder
from tests.engine.evaluation.conftest import CHECKPOINT, copy_with_weights

pytestmark = pytest.mark.usefixtures("trained")


def compare(folder: Path, against: Path | None = None, **options: Any) -> Comparison:
    settings = {"data": None, "windows": 2, "seq_len": 40, "greedy": 8, "device": "cpu"} | options
    return verify(folder, against=against, best=False, notify=lambda _: None, **settings)


def test_rounded_weights_pass_within_the_tolerance_of_their_type():
    other = copy_with_weights(lambda name, value: value.to(torch.bfloat16))
    comparison = compare(CHECKPOINT, other, data="data/corpus")
    assert 1e-4 < comparison.logits < comparison.tolerance == 5e-2
    assert compare(other).tolerance == 1e-4  # with itself


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"logits": 2e-4}, False),
        ({"their_loss": 3.001}, False),
        ({"agreed": 7}, False),
        ({"agreed": 7, "is_tie": True}, True),
        ({"logits": float("nan")}, False),
    ],
    ids=str,
)
def test_logits_loss_and_greedy_tokens_must_all_agree(change, passed):
    equal = {
        "folder": CHECKPOINT, "against": CHECKPOINT, "tokens": 80, "source": "random tokens",
        "logits": 1e-5, "largest": 1e-5, "loss": 3.0, "their_loss": 3.0, "agreed": 8, "greedy": 8,
        "is_tie": False, "text": "", "their_text": "", "tolerance": 1e-4,
    }  # fmt: skip
    assert Comparison(**(equal | change)).passed is passed


@pytest.mark.parametrize(("gap", "is_tie"), [(0.0, True), (7e-4, True), (9e-4, False)])
def test_tokens_within_twice_the_tolerance_are_a_tie(gap, is_tie):
    """The bound is relative to the largest logit, 4 here: 2 x 1e-4 x 4 = 8e-4."""

    def model(tokens: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        assert tokens.tolist() == [[5, 6]]
        assert last_only
        return torch.tensor([[[1.0, 1.0 + gap, -4.0]]])

    pair = (0, 1)
    assert _is_tie(cast(Decoder, model), [5, 6], pair, 1e-4, torch.device("cpu")) is is_tie


def test_missing_weights_are_refused_not_initialized_at_random():
    missing = "model.layers.1.mlp.up_proj.weight"
    other = copy_with_weights(lambda name, value: None if name == missing else value)
    with pytest.raises(CheckpointError, match=f"transformers misses 1 tensors, {missing}"):
        compare(CHECKPOINT, other)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.down_proj.weight"])
def test_logits_that_are_not_finite_are_refused(name):
    broken = copy_with_weights(lambda n, value: value * float("nan") if n == name else value)
    for folder, against in ((broken, None), (CHECKPOINT, broken)):
        with pytest.raises(CheckpointError, match=f"{broken}: its logits are not finite"):
            compare(folder, against)


@pytest.mark.parametrize("factor", [2, 0.5])
def test_a_model_with_another_vocabulary_is_refused(factor):
    config = json.loads((CHECKPOINT / "config.json").read_text())
    vocabulary = int(factor * config["vocab_size"])
    other = copy_with_weights(
        lambda name, value: torch.cat([value, value])[:vocabulary] if "embed" in name else value
    )
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": vocabulary}))
    with pytest.raises(CheckpointError, match=f"{vocabulary} tokens, .* different models"):
        compare(CHECKPOINT, other)
