"""Key/value caches: ring buffers, growing buffers, and prompts whose padding is not cached."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.model.config import FULL, SLIDING, variant
from pretrain_cli.model.counting import cache_bytes
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.kv_cache import KVCache, LayerCache, seen_places
from pretrain_cli.model.presets import preset
from tests.model.attention_backends.cases import ON_A_CPU

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


def new_cache(config, capacity=LENGTH, batch=2, **more):
    cpu = torch.device("cpu")
    return KVCache(config, batch=batch, capacity=capacity, device=cpu, dtype=torch.float32, **more)


@torch.no_grad()
def piecewise(model, tokens, split, capacity=LENGTH):
    """Return the logits of all tokens, fed through one cache in pieces of these lengths."""
    assert sum(split) == tokens.shape[1]
    cache = new_cache(model.config, capacity)
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
    """Return logits of eager attention without a cache, by window."""
    with torch.no_grad():
        return {w: build(sliding_window=w)(tokens) for w in (1, W, LENGTH, FOREVER)}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("attention", ON_A_CPU)
def test_cached_logits_equal_those_of_the_whole_sequence(build, tokens, whole, attention, split):
    ours = piecewise(build(attention, sliding_window=W), tokens, split)
    torch.testing.assert_close(ours, whole[W], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", [SPLITS["one by one"], SPLITS["uneven chunks"]], ids=str)
@pytest.mark.parametrize("window", [1, LENGTH, FOREVER])
@pytest.mark.parametrize("attention", ON_A_CPU)
def test_windows_may_be_one_or_longer_than_the_text(build, tokens, whole, attention, window, split):
    ours = piecewise(build(attention, sliding_window=window), tokens, split)
    torch.testing.assert_close(ours, whole[window], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "moe"])
@pytest.mark.parametrize("attention", ON_A_CPU)
def test_full_layers_keep_all_keys_and_values(build, tokens, attention, family):
    model = build(attention, family)
    with torch.no_grad():
        expected = model(tokens)
    ours = piecewise(model, tokens, SPLITS["uneven chunks"], capacity=2 * LENGTH)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_last_only_computes_only_the_last_logits(build, tokens):
    model = build()
    with torch.no_grad():
        expected = model(tokens)[:, -1:]
        ours = model(tokens, last_only=True)
    assert ours.shape == (2, 1, 60)
    torch.testing.assert_close(ours, expected)


@given(pieces=st.lists(st.integers(1, 12), min_size=1, max_size=25), window=st.integers(1, 9))
def test_a_ring_returns_visible_positions_and_then_the_new_ones(pieces, window):
    """Compare with a list: the last window − 1 positions before the piece, then the piece."""
    layer = LayerCache(torch.zeros(1, 1, window, 2), window)
    start = 0
    for length in pieces:
        stream = torch.arange(start, start + length).float().view(1, length, 1, 1)
        k, v = layer.extend(stream.expand(-1, -1, -1, 2), -stream.expand(-1, -1, -1, 2))
        expected = list(range(max(0, start - window + 1), start + length))
        assert k[0, :, 0, 0].tolist() == expected
        assert v[0, :, 0, 1].tolist() == [-x for x in expected]
        start += length


@given(ends=st.lists(st.integers(1, 20), min_size=1, max_size=4), chunk=st.integers(1, 20))
def test_padding_of_a_prompt_does_not_overwrite_its_cached_keys(ends, chunk):
    window, longest = 5, max(ends)
    layer = LayerCache(torch.full((len(ends), 1, window, 1), -1.0), window)
    layer.ends = ends
    positions = torch.arange(longest).float().view(1, longest, 1, 1).expand(len(ends), -1, -1, -1)
    for piece in positions.split(chunk, dim=1):
        layer.extend(piece, piece)
    for row, end in enumerate(ends):
        expected = [-1.0] * window
        for position in range(end):
            expected[position % window] = position
        assert layer.keys[row, 0, :, 0].tolist() == expected


@pytest.mark.parametrize("window", [None, 5])
def test_the_memory_layout_of_values_does_not_change_them(window):
    plain, along = (
        LayerCache(torch.zeros(2, 3, 5, 4), window, along_places=way) for way in (False, True)
    )
    pieces = torch.randn(2, 2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for layer in (plain, along):
        layer.extend(*pieces)
        layer.grow(9)
    assert torch.equal(along.keys, plain.keys)
    assert torch.equal(along.values, plain.values)
    assert along.keys.is_contiguous()
    assert along.values.mT.is_contiguous()


def test_seen_places_as_small_literal_rows():
    ring = seen_places(torch.tensor([0, 2, 3, 9]), 4)
    assert ring.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_ring_cache_holds_a_window_and_full_cache_grows_to_capacity(make_config):
    config = make_config(layer_types=(SLIDING, FULL), sliding_window=W)
    cache = new_cache(config, capacity=5000)
    sliding, full = cache.layers
    sizes = []
    for length in range(1, 5001):
        before = full.keys
        cache.reserve(length)
        if full.keys is not before:
            sizes.append(full.places)
    assert sliding.places == W
    assert sizes[0] == 512
    assert sizes[-1] == 5000
    assert all(bigger <= max(smaller * 1.125 + 256, smaller + 512)
               for smaller, bigger in itertools.pairwise(sizes))  # fmt: skip
    assert sum(sizes) < 15 * 5000  # all copies of growing: linear in the length


def test_a_buffer_is_no_longer_than_the_capacity(make_config):
    config = make_config(layer_types=(SLIDING, FULL), sliding_window=1024)
    assert [layer.places for layer in new_cache(config, capacity=10).layers] == [10, 10]


@pytest.mark.parametrize(("length", "expected"), [(32_768, 3_120_562_176), (1024, 520_093_696)])
def test_cache_bytes_of_gemma3_27b_equal_the_formula(length, expected):
    """62 layers, 10 of them full; 16 key/value heads of 128, in bfloat16; a window of 1024:
    2 · 2 · 16 · 128 · (10 · 32768 + 52 · 1024) bytes."""
    config = preset("gemma3-27b")
    assert cache_bytes(config, length, 2) == expected
    one_layer_each = variant(config, {"layer_types": config.layer_types[4:6]})
    cache = new_cache(one_layer_each, capacity=length, batch=1, whole=True)
    sliding, full = (2 * 2 * 16 * 128 * places for places in (min(1024, length), length))
    assert cache.bytes == 2 * (sliding + full)  # in float32
    assert 52 * sliding + 10 * full == expected
