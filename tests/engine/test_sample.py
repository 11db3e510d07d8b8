"""Choosing tokens, and text as it is made."""

import pytest
import torch

from pretrain_cli.config import SpeedConfig
from pretrain_cli.data.tokenizer import load_tokenizer
from pretrain_cli.engine.sample import Controls, choose, sample_text, sample_tokens
from pretrain_cli.engine.speed import build_model, resolve_speed
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.config import variant
from pretrain_cli.model.presets import preset

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["gemma3-tiny", "qwen3-tiny"])
def model(request):
    config = variant(
        preset(request.param),
        {"hidden_size": 32, "vocab_size": 320, "max_position_embeddings": 64,
         "initializer_range": 0.3, "pad_token_id": None},
    )  # fmt: skip
    if config.sliding_window:
        config = variant(config, {"sliding_window": 6})
    model = build_model(config, resolve_speed(SpeedConfig(dtype="float32"), CPU), CPU)
    model.initialize(0)
    return model.eval()


def draws(logits, **controls):
    generator = torch.Generator().manual_seed(0)
    settled = Controls(**controls)
    return {choose(torch.tensor(logits), settled, generator) for _ in range(300)}


def test_temperature_zero_takes_the_likeliest():
    assert draws([0.0, 3.0, 1.0], temperature=0) == {1}


def test_top_k_leaves_the_k_likeliest():
    assert draws([2.0, 3.0, 1.0, 2.5], temperature=5.0, top_k=2) == {1, 3}


def test_top_p_leaves_the_fewest_that_reach_p():
    # probabilities 0.5, 0.3, 0.15, 0.05
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert draws(logits, temperature=1.0, top_p=0.5) == {0}
    assert draws(logits, temperature=1.0, top_p=0.75) == {0, 1}
    assert draws(logits, temperature=1.0, top_p=1.0) == {0, 1, 2, 3}


def test_frequencies_follow_the_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    controls = Controls(temperature=1.0)
    drawn = [choose(logits.clone(), controls, generator) for _ in range(4000)]
    assert drawn.count(0) / 4000 == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 30])
def test_greedy_text_is_the_same_with_and_without_a_cache(model, length):
    prompt = [(7 * i) % 250 for i in range(length)]
    texts = [
        list(
            sample_tokens(
                model,
                prompt,
                Controls(max_tokens=30, temperature=0, use_cache=cache),
                end=-1,
                known=320,
            )
        )
        for cache in (True, False)
    ]
    assert len(texts[0]) == 30
    assert texts[0] == texts[1]


def test_the_same_seed_gives_the_same_text(model):
    tokenizer = load_tokenizer("bytes")

    def text(seed):
        return "".join(
            sample_text(model, tokenizer, "def", Controls(max_tokens=20, temperature=2, seed=seed))
        )

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_text_ends_at_the_end_of_document_and_at_the_last_position(model):
    first = next(
        sample_tokens(model, [5, 6], Controls(temperature=0, max_tokens=1), end=-1, known=320)
    )
    stopped = sample_tokens(model, [5, 6], Controls(temperature=0), end=first, known=320)
    assert list(stopped) == []
    full = sample_tokens(model, [5] * 60, Controls(max_tokens=100), end=-1, known=320)
    assert len(list(full)) == 4
    with pytest.raises(ConfigError, match="64 positions"):
        list(sample_tokens(model, [5] * 64, Controls(), end=-1, known=320))


def test_rows_that_pad_the_vocabulary_are_never_chosen(model):
    drawn = sample_tokens(model, [5], Controls(max_tokens=60, temperature=100), end=-1, known=10)
    assert all(token < 10 for token in drawn)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_tokens": 0}]
)
def test_controls_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("_", "-")):
        Controls(**wrong)
