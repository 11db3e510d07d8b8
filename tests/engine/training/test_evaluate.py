"""Validation counts every token once, for any batch shape."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.data.mixture import Source, mix
from pretrain_cli.data.tokenizing.tokenize import TokenizeRequest, tokenize
from pretrain_cli.engine.runs.events import Evaluation
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.speed import build_model, resolve_speed
from pretrain_cli.engine.training.evaluate import evaluate
from pretrain_cli.model.config import variant
from pretrain_cli.model.presets import preset

CPU = torch.device("cpu")


def small_model(name="qwen3-tiny"):
    config = variant(preset(name), {"hidden_size": 32, "vocab_size": 320})
    model = build_model(config, resolve_speed(SpeedConfig(dtype="float32"), CPU), CPU)
    model.initialize(3)
    return model


def evaluated(model, *folders, batch_size=2, at_most=None, **options):
    mixture = mix([Source(str(folder), None, open_dataset(folder)) for folder in folders])
    if at_most is not None:
        mixture = mixture.validated_on(at_most)
    ranks = Ranks(0, 1, CPU)
    return evaluate(
        model, mixture, step=7, seq_len=32, batch_size=batch_size, ranks=ranks, **options
    )


def plainly(model, tokens):
    """Return the summed loss of all tokens but the first, computed one window at a time."""
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            window = tokens[start : start + 33]
            logits = model(window[None, :-1])[0]
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_validation_loss_is_the_mean_over_all_tokens_for_any_batch(dataset, batch_size):
    model = small_model()
    opened = open_dataset(dataset)
    stream = opened.val.tokens
    tokens = torch.from_numpy(stream.read(0, len(stream)))
    total = plainly(model, tokens)
    result = evaluated(model, dataset, batch_size=batch_size)
    assert result.sources == {}
    assert result.tokens == result.split_tokens == len(tokens) - 1
    assert result.loss == pytest.approx(total / result.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / result.tokens), rel=1e-4)
    assert result.evaluation_time > 0
    text = sum(len(path.read_bytes()) for path in held_out(dataset, opened))
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / text, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_token_limit_validates_a_prefix_of_each_split(dataset, other_dataset, batch_size):
    """Any batch size validates 100 targets; bits per byte divides by the bytes of these alone."""
    model = small_model()
    stream = open_dataset(dataset).val.tokens
    tokens = stream.read(0, 101)
    total = plainly(model, torch.from_numpy(tokens))
    result = evaluated(model, dataset, other_dataset, batch_size=batch_size, at_most=100)
    (source,) = result.sources.values()
    for each in (result, source):
        assert (each.tokens, each.split_tokens) == (100, len(stream) - 1)
        assert each.loss == pytest.approx(total / 100, rel=1e-5)
        size = int((tokens < 256).sum())  # a token is a byte; larger ids end a document
        assert each.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)
    whole = evaluated(model, dataset, at_most=10**6)
    assert whole.tokens == whole.split_tokens == len(stream) - 1


def test_eval_tokens_limits_the_validation_of_a_run(settings, run):
    events = run(settings(train__steps=1, train__eval_tokens=50))
    (evaluation,) = [event for event in events if isinstance(event, Evaluation)]
    assert evaluation.tokens == 50 < evaluation.split_tokens


def test_masked_validation_equals_that_of_each_document_alone(dataset):
    """Validation windows hold parts of several documents."""
    model = small_model("gemma3-tiny")
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
    result = evaluated(model, dataset, batch_size=3, document_mask=True)
    assert result.tokens == len(tokens) - 1
    assert result.loss == pytest.approx(total / result.tokens, rel=1e-5)


def test_a_mixture_is_validated_per_source_and_overall(dataset, other_dataset, tmp_path):
    """Every token counts once: the overall loss is the mean of the sources' losses by tokens, and
    bits per byte their mean by bytes. A source without a validation split is left out."""
    (tmp_path / "birds").mkdir()
    for number in range(20):
        (tmp_path / f"birds/{number}.txt").write_text(f"{number} birds sing" * (number + 1))
    birds = TokenizeRequest(
        paths=(str(tmp_path / "birds"),), out=tmp_path / "b", tokenizer="bytes", val_fraction=0.3
    )
    tokenize(birds, lambda *_: None)
    model = small_model()
    alone = {str(folder): evaluated(model, folder) for folder in (dataset, birds.out)}
    both = evaluated(model, dataset, other_dataset, birds.out)
    assert both.sources.keys() == alone.keys()
    for name, result in both.sources.items():
        assert result.loss == alone[name].loss
        assert result.bits_per_byte == alone[name].bits_per_byte
        assert result.tokens == alone[name].tokens
    tokens = [result.tokens for result in alone.values()]
    assert both.tokens == sum(tokens)
    losses = [result.loss * count for result, count in zip(alone.values(), tokens, strict=True)]
    assert both.loss == pytest.approx(sum(losses) / sum(tokens))
    bits = [loss / math.log(2) for loss in losses]
    sizes = [b / result.bits_per_byte for b, result in zip(bits, alone.values(), strict=True)]
    assert both.bits_per_byte == pytest.approx(sum(bits) / sum(sizes))


def test_evaluate_returns_none_without_a_validation_split(other_dataset):
    assert evaluated(small_model(), other_dataset) is None


def held_out(dataset, opened):
    """Return the files whose text is in the validation split, found by decoding it."""
    stream = opened.val.tokens
    text = opened.tokenizer.backend.decode(
        stream.read(0, len(stream)).tolist(), skip_special_tokens=False
    )
    documents = set(text.split("<|endoftext|>"))
    files = sorted((dataset.parent / "corpus").iterdir())
    return [path for path in files if path.read_text() in documents]
