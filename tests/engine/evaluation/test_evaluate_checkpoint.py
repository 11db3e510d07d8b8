"""Validation of a checkpoint: transformers' loss, --eval-tokens, document masks."""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.data.tokenizing.tokenize import TokenizeRequest, tokenize
from pretrain_cli.engine.evaluation import evaluate_checkpoint as evaluate_checkpoint_module
from pretrain_cli.engine.evaluation.evaluate_checkpoint import (
    EvaluateRequest,
    EvaluateResult,
    evaluate_checkpoint,
    run_settings,
)
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.presets import preset
from tests.engine.evaluation.conftest import CHECKPOINT

DATASETS = ("data/corpus", "data/birds")


def evaluate(**options: Any) -> EvaluateResult:
    result = evaluate_checkpoint(EvaluateRequest(**options), lambda _: None)
    assert result is not None
    return result


@pytest.fixture(autouse=True)
def birds(trained: Path) -> None:
    """Tokenize a second dataset, data/birds, for the trained checkpoint."""
    Path("birds").mkdir()
    for number in range(20):
        Path(f"birds/{number}.txt").write_text(f"{number} birds sing" * (number + 1))
    request = TokenizeRequest(
        paths=("birds",), out=Path("data/birds"), tokenizer="bytes", val_fraction=0.3
    )
    tokenize(request, lambda *_: None)


def reference(
    dataset: str, targets: int | None = None, folder: Path = CHECKPOINT
) -> tuple[float, int, int]:
    """Return (nats, targets, bytes) of a validation split, computed by transformers one window at
    a time. Tokens are bytes, except the end of a document, which is not text."""
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = open_dataset(Path(dataset)).val.tokens
    ids = torch.from_numpy(tokens.read(0, len(tokens) if targets is None else targets + 1))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            logits = model.eval()(window[None, :-1]).logits[0]
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total, len(ids) - 1, int((ids < 256).sum())


def test_losses_of_each_dataset_and_overall_equal_transformers():
    evaluation = evaluate(data=DATASETS).evaluation
    sums = {name: reference(name) for name in DATASETS}
    sums["all"] = tuple(map(sum, zip(*sums.values(), strict=True)))
    for name, (nats, targets, size) in sums.items():
        part = evaluation if name == "all" else evaluation.sources[name]
        assert part.tokens == targets
        assert part.loss == pytest.approx(nats / targets, rel=1e-5)
        assert part.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_eval_tokens_takes_the_first_tokens_of_each_dataset():
    sources = evaluate(data=DATASETS, eval_tokens=100).evaluation.sources
    for name in DATASETS:
        nats, targets, size = reference(name, 100)
        assert sources[name].tokens == targets == 100
        assert sources[name].loss == pytest.approx(nats / 100, rel=1e-5)
        assert sources[name].bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    beyond, whole = evaluate(eval_tokens=1_000_000), evaluate()
    clock = {"time": 0.0, "evaluation_time": 0.0}
    assert replace(beyond.evaluation, **clock) == replace(whole.evaluation, **clock)


def test_a_document_mask_changes_the_loss_and_not_the_tokens():
    plain = evaluate(data=("data/birds",))
    masked = evaluate(data=("data/birds",), document_mask=True, attention="eager")
    assert (plain.document_mask, masked.document_mask) == (False, True)
    assert masked.evaluation.tokens == plain.evaluation.tokens
    assert masked.evaluation.loss != pytest.approx(plain.evaluation.loss, rel=1e-5)


def test_settings_are_read_from_the_checkpoints_run():
    settings = run_settings(CHECKPOINT)
    assert settings["data"] == {
        "path": "data/corpus", "tokenizer": None, "seq_len": 32, "document_mask": False,
    }  # fmt: skip
    assert settings["speed"]["dtype"] == "float32"
    assert settings["speed"]["compile"] is False
    assert run_settings(Path("elsewhere")) == {"data": {}, "speed": {"compile": False}}


def test_evaluation_refuses_to_compile_experts_in_float32(monkeypatch):
    experts = preset("qwen3-30b-a3b")
    monkeypatch.setattr(evaluate_checkpoint_module, "read_config", lambda folder: experts)
    with pytest.raises(ConfigError, match="doesn't compile products of experts in float32"):
        evaluate(dtype="float32", compile=True)
