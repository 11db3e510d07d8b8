"""Sampling with a cache gives the logits of the whole sequence, and sliding layers stay small."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.model.attention_backends import BACKENDS
from pretrain_cli.model.config import FULL, SLIDING
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.kv_cache import KVCache, LayerCache

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

W, LENGTH = 7, 30
FOREVER = 1000
SPLITS = {
    "one by one": [1] * LENGTH,
    "prompt of window-1": [W - 1] + [1] * (LENGTH - W + 1),
    "prompt of window": [W] + [1] * (LENGTH - W),
    "prompt of window+1": [W + 1] + [1] * (LENGTH - W - 1),
    "prompt of two windows": [2 * W] + [1] * (LENGTH - 2 * W),
    "prompt of two windows+1": [2 * W + 1] + [1] * (LENGTH - 2 * W - 1),
    "long prompt": [LENGTH - 3, 1, 1, 1],
    "long prompt twice": [14, 1, 14, 1],
    "chunks of 3": [3] * (LENGTH // 3),
    "chunks of window": [W] * (LENGTH // W) + [LENGTH % W],
    "uneven chunks": [2, 8, 1, 1, 6, 9, 3],
    "all at once": [LENGTH],
}


def new_cache(model, capacity=LENGTH):
    return KVCache(
        model.config, batch=2, capacity=capacity, device=torch.device("cpu"), dtype=model.dtype
    )


@torch.no_grad()
def piecewise(model, tokens, split, capacity=LENGTH):
    """The logits of all tokens, fed in pieces of these lengths through one cache."""
    assert sum(split) == tokens.shape[1]
    cache = new_cache(model, capacity)
    return torch.cat([model(piece, cache=cache) for piece in tokens.split(split, dim=1)], dim=1)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, 60, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def build(make_config, wide):
    def make(attention="eager", family="gemma3", **changes):
        model = Decoder(make_config(family, **changes), attention=attention)
        wide(model)
        return model

    return make


@pytest.fixture(scope="module")
def whole(build, tokens):
    """Logits without a cache, of eager attention, by window."""
    with torch.no_grad():
        return {w: build(sliding_window=w)(tokens) for w in (1, W, LENGTH, FOREVER)}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("attention", BACKENDS)
def test_cached_logits_are_those_of_the_whole_sequence(build, tokens, whole, attention, split):
    ours = piecewise(build(attention, sliding_window=W), tokens, split)
    torch.testing.assert_close(ours, whole[W], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", [SPLITS["one by one"], SPLITS["uneven chunks"]], ids=str)
@pytest.mark.parametrize("window", [1, LENGTH, FOREVER])
@pytest.mark.parametrize("attention", BACKENDS)
def test_windows_may_be_one_or_longer_than_the_text(build, tokens, whole, attention, window, split):
    ours = piecewise(build(attention, sliding_window=window), tokens, split)
    torch.testing.assert_close(ours, whole[window], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "moe"])
@pytest.mark.parametrize("attention", BACKENDS)
def test_full_layers_remember_everything(build, tokens, attention, family):
    model = build(attention, family)
    with torch.no_grad():
        expected = model(tokens)
    ours = piecewise(model, tokens, SPLITS["uneven chunks"], capacity=2 * LENGTH)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_only_the_last_logits_are_formed_when_asked(build, tokens):
    model = build()
    with torch.no_grad():
        expected = model(tokens)[:, -1:]
        ours = model(tokens, last_only=True)
    assert ours.shape == (2, 1, 60)
    torch.testing.assert_close(ours, expected)


def test_sliding_layers_hold_a_bounded_buffer_and_window_minus_one_keys(build):
    model = build(layer_types=(SLIDING, FULL), sliding_window=W)
    cache = new_cache(model, capacity=500)
    sliding, full = cache.layers
    tokens = torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():
        for seen in range(1, 60):
            model(tokens, cache=cache)
            assert cache.length == len(full) == seen
            assert len(sliding) == min(seen, W - 1)
    assert sliding.keys.shape[1] < 2 * W
    assert full.keys.shape[1] == 500


def test_a_long_prompt_leaves_no_more_than_a_window_behind(build):
    model = build(layer_types=(SLIDING,), sliding_window=W)
    cache = new_cache(model, capacity=500)
    with torch.no_grad():
        model(torch.ones(2, 400, dtype=torch.long), cache=cache)
    assert len(cache.layers[0]) == W - 1
    assert cache.layers[0].keys.untyped_storage().nbytes() == 2 * (2 * W - 1) * 2 * 16 * 4


def test_a_buffer_is_no_longer_than_the_text_can_be(build):
    cache = new_cache(build(layer_types=(SLIDING, FULL), sliding_window=1024), capacity=10)
    assert [layer.keys.shape[1] for layer in cache.layers] == [10, 10]


@given(
    pieces=st.lists(st.integers(1, 12), min_size=1, max_size=25),
    remembered=st.integers(0, 8),
    spare=st.integers(1, 10),
)
def test_a_layer_gives_what_it_remembers_and_then_the_new(pieces, remembered, spare):
    """Against a list: the last `remembered` positions before the piece, then the piece."""
    layer = LayerCache(torch.empty(1, remembered + spare, 1, 2), remembered)
    start = 0
    for length in pieces:
        stream = torch.arange(start, start + length).float().view(1, length, 1, 1)
        k, v = layer.extend(stream.expand(-1, -1, -1, 2), -stream.expand(-1, -1, -1, 2))
        expected = list(range(max(0, start - remembered), start + length))
        assert k[0, :, 0, 0].tolist() == expected
        assert v[0, :, 0, 1].tolist() == [-x for x in expected]
        start += length
        assert len(layer) == min(start, remembered)
