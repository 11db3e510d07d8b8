"""Fifty steps of a run against a plain training loop around a transformers model."""

import importlib

import pytest
import torch

from pretrain_cli.engine.runs.events import StepMetrics
from pretrain_cli.engine.training import train as training

STEPS = 50
NUMBERS = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "Gemma3": {"num_hidden_layers": 7, "sliding_window": 9, "query_pre_attn_scalar": 16},
    "Qwen3": {"num_hidden_layers": 3},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_losses_equal_those_of_a_transformers_training_loop(
    settings, run, tmp_path, monkeypatch, family
):
    """Both use the same initial weights, batches, learning rates, clipping and AdamW. The run
    accumulates two micro-batches a step."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    name = {"Gemma3": "Gemma3TextConfig", "Qwen3": "Qwen3Config"}[family]
    config = getattr(transformers, name)(**NUMBERS, **FAMILIES[family])
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    theirs.save_pretrained(tmp_path / "start")

    batches, real = [], training.train_step

    def spied(job, batch, *rest, **options):
        batches.append((batch.inputs.clone(), batch.targets.clone()))
        return real(job, batch, *rest, **options)

    monkeypatch.setattr(training, "train_step", spied)
    events = run(
        settings(model__init_from=tmp_path / "start", train__steps=STEPS, train__sample_tokens=0)
    )
    ours = [event for event in events if isinstance(event, StepMetrics)]

    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    norms = [p for p in theirs.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    expected = []
    for (inputs, targets), line in zip(batches, ours, strict=True):
        for group in adamw.param_groups:
            group["lr"] = line.learning_rate
        logits = theirs(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        expected.append(loss.item())
    assert len(expected) == STEPS
    assert expected[-1] < 0.8 * expected[0]
    assert [line.loss for line in ours] == pytest.approx(expected, rel=1e-4)
