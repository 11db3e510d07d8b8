"""Decoding one token of every text at a time gives the logits of each whole text."""

import pytest
import torch

from pretrain_cli.model.config import FULL, SLIDING
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.inference.cpu_linear import SummedLinear
from pretrain_cli.model.inference.decode import CHUNK, DecodeSession, attend, attend_by_sums
from pretrain_cli.model.parameter_map import Merged
from tests.model.attention_backends.cases import ON_A_CPU

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

W, NEW = 7, 12
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def build(make_config, wide):
    def make(attention="eager", family="gemma3", **changes):
        model = Decoder(make_config(family, **changes), attention=attention)
        wide(model)
        return model.eval()

    return make


def draw(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 60, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def last_logits(model, texts):
    """Return the last logits of each whole text alone, without a cache."""
    return torch.cat([model(torch.tensor([ids]), last_only=True)[0] for ids in texts])


def compare(model, writer, prompts, new=NEW, capacity=None, **tolerance):
    """Prefill the prompts together, move each to its own row, and continue token by token."""
    lengths = [len(ids) for ids in prompts]
    prefix = writer.new_cache(batch=len(prompts), capacity=max(lengths), ends=lengths)
    logits = writer.prefill(prefix, prompts)
    cache = writer.new_cache(batch=len(prompts), capacity=capacity or max(lengths) + new)
    for row, length in enumerate(lengths):
        cache.take(row, prefix, row, length)
    texts = [list(ids) for ids in prompts]
    continuations = draw(*[new] * len(prompts))
    positions = torch.tensor(lengths)
    for turn in range(new):
        torch.testing.assert_close(logits, last_logits(model, texts), **tolerance or TOLERANCE)
        tokens = [ids[turn] for ids in continuations]
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        cache.reserve(max(map(len, texts)))
        logits = writer.step(cache, torch.tensor(tokens), positions)
        positions = positions + 1
    torch.testing.assert_close(logits, last_logits(model, texts), **tolerance or TOLERANCE)
    return cache


@pytest.mark.parametrize("length", [1, W - 1, W, W + 1, 2 * W, 2 * W + 1, 30])
@pytest.mark.parametrize("attention", ON_A_CPU)
def test_a_step_gives_the_logits_of_the_whole_text(build, attention, length):
    compare(build("eager"), DecodeSession(build(attention)), draw(length))


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "moe"])
@pytest.mark.parametrize("attention", ON_A_CPU)
def test_texts_of_different_lengths_are_decoded_together(build, attention, family):
    prompts = draw(30, 1, W - 1, W, W + 1, 2 * W, 23)
    compare(build("eager", family), DecodeSession(build(attention, family)), prompts)


@pytest.mark.parametrize("window", [1, 2, 40, 1000])
def test_windows_may_be_one_or_longer_than_the_text(build, window):
    model = build(sliding_window=window)
    compare(model, DecodeSession(model), draw(30, 3))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_decoding_works_with_any_number_of_key_value_heads(build, groups):
    model = build(num_key_value_heads=groups)
    compare(model, DecodeSession(model), draw(9, 20))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_attention_by_sums_is_softmax_of_scores_over_values(dtype, rounding, groups):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 8, 16, generator=generator).to(dtype)
    keys, values = torch.randn(2, 3, groups, 20, 16, generator=generator).to(dtype)
    unseen = torch.arange(20) > torch.tensor([[0], [7], [19]])
    mask = torch.zeros(3, 20, dtype=dtype).masked_fill(unseen, float("-inf"))[:, None, None]
    k, v = (x.double().repeat_interleave(8 // groups, dim=1) for x in (keys, values))
    scores = torch.einsum("bhd,bhsd->bhs", q.double(), k) * 0.3
    weights = scores.masked_fill(unseen[:, None], float("-inf")).softmax(-1)
    expected = torch.einsum("bhs,bhsd->bhd", weights, v)
    for each in (attend, attend_by_sums):
        out = each(q, keys, values, mask, 0.3)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "merged"), [("gemma3", Merged()), ("qwen3", Merged(qkv=False, gate_up=False))]
)
def test_one_compiled_text_has_equal_logits_and_copies_no_head(make_config, wide, family, merged):
    plain, fast = (
        Decoder(make_config(family, tie_word_embeddings=True), merged=merged).eval()
        for _ in range(2)
    )
    for model in (plain, fast):
        wide(model)
    writer = DecodeSession(fast, fast=True, compiled=True, rows=1)
    assert isinstance(writer.head, SummedLinear)
    assert writer.head.weight.data_ptr() == fast.embedding.weight.data_ptr()
    compare(plain, writer, draw(11))


def test_a_long_prompt_is_prefilled_in_chunks(build, monkeypatch):
    """Chunks are shorter than the window, equal to it and longer; layers are of both kinds."""
    model = build(layer_types=(SLIDING, FULL))
    for chunk in (3, W, 20):
        monkeypatch.setattr("pretrain_cli.model.inference.decode.CHUNK", chunk)
        compare(model, DecodeSession(model), draw(33), new=3)
        monkeypatch.setattr("pretrain_cli.model.inference.decode.CHUNK", 3 * chunk)
        compare(model, DecodeSession(model), draw(33, 32, 14), new=3)
    assert CHUNK >= 128


def test_a_growing_full_layer_keeps_its_keys_and_values(build, monkeypatch):
    monkeypatch.setattr("pretrain_cli.model.kv_cache.CAPACITY_STEP", 4)
    model = build(layer_types=(SLIDING, FULL), sliding_window=W)
    cache = compare(model, DecodeSession(model), draw(5, 2), new=25, capacity=500)
    assert [layer.places for layer in cache.layers] == [W, 32]


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_bfloat16_logits_differ_only_by_rounding(make_config, wide, family):
    model = Decoder(make_config(family), dtype=torch.bfloat16)
    wide(model)
    compare(model, DecodeSession(model), draw(11, 25), rtol=0.1, atol=0.25)
