"""Validation: every token once, whatever the batch shape."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from pretrain_cli.config import SpeedConfig
from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.engine.distributed import Ranks
from pretrain_cli.engine.evaluate import evaluate
from pretrain_cli.engine.speed import build_model, resolve_speed
from pretrain_cli.model.config import variant
from pretrain_cli.model.presets import preset

CPU = torch.device("cpu")


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_validation_is_the_mean_over_every_token_whatever_the_batch(dataset, batch_size):
    config = variant(preset("qwen3-tiny"), {"hidden_size": 32, "vocab_size": 320})
    model = build_model(config, resolve_speed(SpeedConfig(dtype="float32"), CPU), CPU)
    model.initialize(3)
    opened = open_dataset(dataset)
    stream = opened.val.tokens
    tokens = torch.from_numpy(stream.read(0, len(stream)))
    total = 0.0
    with torch.no_grad():  # window by window, as plainly as can be
        for start in range(0, len(tokens) - 1, 32):
            window = tokens[start : start + 33]
            logits = model(window[None, :-1])[0]
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    result = evaluate(
        model, opened, step=7, seq_len=32, batch_size=batch_size, ranks=Ranks(0, 1, CPU)
    )
    assert result.tokens == len(tokens) - 1
    assert result.loss == pytest.approx(total / result.tokens, rel=1e-5)
    text = sum(len(path.read_bytes()) for path in held_out(dataset, opened))
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / text, rel=1e-5)


def test_masked_validation_is_that_of_each_document_by_itself(dataset):
    """Of each part of one, that is, that a window of validation holds."""
    config = variant(preset("gemma3-tiny"), {"hidden_size": 32, "vocab_size": 320})
    model = build_model(config, resolve_speed(SpeedConfig(dtype="float32"), CPU), CPU)
    model.initialize(3)
    opened = open_dataset(dataset)
    stream = opened.val.tokens
    tokens = torch.from_numpy(stream.read(0, len(stream)))
    total, parts, windows = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            window = tokens[start : start + 33]
            inputs, targets = window[:-1], window[1:]
            ends = ((inputs == opened.tokenizer.eos).nonzero().flatten() + 1).tolist()
            windows += 1
            for first, last in itertools.pairwise(dict.fromkeys((0, *ends, len(inputs)))):
                logits = model(inputs[None, first:last])[0]
                total += F.cross_entropy(logits, targets[first:last], reduction="sum").item()
                parts += 1
    assert parts > windows
    result = evaluate(
        model, opened, step=7, seq_len=32, batch_size=3, ranks=Ranks(0, 1, CPU), document_mask=True
    )
    assert result.tokens == len(tokens) - 1
    assert result.loss == pytest.approx(total / result.tokens, rel=1e-5)


def held_out(dataset, opened):
    """The files whose text is in the validation split, found by decoding it."""
    stream = opened.val.tokens
    text = opened.tokenizer.backend.decode(
        stream.read(0, len(stream)).tolist(), skip_special_tokens=False
    )
    documents = set(text.split("<|endoftext|>"))
    files = sorted((dataset.parent / "corpus").iterdir())
    return [path for path in files if path.read_text() in documents]
