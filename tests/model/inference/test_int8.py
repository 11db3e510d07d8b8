"""Int8 matrices: values are rounded to nearest, and all product implementations agree."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.inference.decode import DecodeSession
from pretrain_cli.model.inference.int8 import (
    FEW,
    QuantizedLinear,
    as_floats,
    is_quantized,
    no_quantizing,
    quantize,
)
from pretrain_cli.model.parameter_map import Merged, parameter_map

DTYPES = [torch.float32, torch.bfloat16]


def drawn(*shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


@pytest.fixture(params=["gemma3", "qwen3", "qwen3-apart"])
def model(request, make_config, wide):
    family, _, apart = request.param.partition("-")
    made = Decoder(make_config(family), merged=Merged(*(not apart,) * 2))
    wide(made)
    return made.eval()


@torch.no_grad()
def by_hand(model):
    """Return the decoder with each matrix replaced by integers times one scale a row,
    including the head, but not the embedding."""
    out = copy.deepcopy(model)
    parameters = dict(out.named_parameters())
    for piece in parameter_map(out.config, merged=out.merged):
        matrix = piece.of(parameters[piece.parameter])
        if len(piece.shape) == 2 and piece.name not in ("model.embed_tokens.weight",):
            matrix.copy_(rounded(matrix))
    if out.config.tie_word_embeddings:
        out.config = replace(out.config, tie_word_embeddings=False)
        out.head = torch.nn.Linear(*reversed(out.embedding.weight.shape), bias=False)
        out.head.weight.copy_(rounded(out.embedding.weight))
    return out


def rounded(matrix):
    out = torch.empty_like(matrix)
    for row, values in enumerate(matrix):
        scale = max(values.max(), -values.min()) / 127
        out[row] = torch.stack([torch.round(value) * scale for value in values / scale])
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_changes_by_more_than_half_a_step(dtype):
    weight = drawn(33, 50, scale=0.3)
    weight[3] = 0.0
    weight[4, 7] = 30.0
    linear = QuantizedLinear(weight, dtype)
    steps = weight.abs().amax(1, keepdim=True) / 127
    wide = linear.whole.float() * linear.scales.unsqueeze(1)
    assert ((wide - weight).abs() <= steps * (0.5 + 1e-6) + 1e-30).all()
    assert torch.equal(linear.weight, wide.to(dtype))
    assert linear.whole.dtype == torch.int8
    assert linear.whole[3].count_nonzero() == 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 70])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (50, 33), (7, 1)])
def test_few_rows_and_many_have_the_same_products(dtype, rows, width, height, monkeypatch):
    linear = QuantizedLinear(drawn(height, width), dtype)
    x = drawn(rows, width).to(dtype)
    expected = (x.double() @ linear.whole.double().T) * linear.scales.double()
    of_a_step, of_a_prompt = linear(x), linear(x.view(1, rows, width))[0]
    for out in (of_a_step, of_a_prompt):
        assert out.dtype == dtype
        error = (out.double() - expected).norm() / expected.norm()
        assert error < (2e-6 if dtype == torch.float32 else 5e-3)
    monkeypatch.setattr(linear, "sums", None)
    if rows <= FEW[dtype]:
        with pytest.raises(TypeError):  # few rows call `sums`
            linear(x)
    else:
        linear(x)


def test_a_quantized_model_equals_the_rounded_one_on_every_path(model):
    expected = by_hand(model)
    tokens = torch.randint(1, 60, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(tokens)
        logits = expected(tokens)
        loss = expected(tokens[:, :-1], tokens[:, 1:]).minimized
        quantize(model)
        torch.testing.assert_close(model(tokens), logits, rtol=1e-4, atol=1e-4)
        ours = model(tokens[:, :-1], tokens[:, 1:]).minimized
        torch.testing.assert_close(ours, loss)
    assert not torch.allclose(plain, logits, rtol=1e-3, atol=1e-3)  # rounding shows
    writer = DecodeSession(model, fast=True)
    cache = writer.new_cache(batch=2, capacity=33)
    last = writer.prefill(cache, tokens[:, :20].tolist())
    torch.testing.assert_close(last, logits[:, 19], rtol=1e-4, atol=1e-4)
    for place in range(20, 33):
        positions = torch.full((2,), place)
        last = writer.step(cache, tokens[:, place], positions)
        torch.testing.assert_close(last, logits[:, place], rtol=1e-4, atol=1e-4)
    as_floats(model)
    assert not is_quantized(model)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), logits, rtol=1e-4, atol=1e-4)
    packed = DecodeSession(model, fast=True)
    last = packed.prefill(packed.new_cache(batch=2, capacity=33), tokens.tolist())
    torch.testing.assert_close(last, logits[:, -1], rtol=1e-4, atol=1e-4)


def test_the_embedding_is_not_quantized(make_config, wide):
    model = Decoder(make_config())
    wide(model)
    before = model.embedding.weight.clone()
    quantize(model)
    assert torch.equal(model.embedding.weight, before)
    assert not torch.equal(model.head_weight, before)
    assert F.cosine_similarity(model.head_weight, before).min() > 0.999


def test_a_mixture_of_experts_is_not_quantized(make_config):
    reason = no_quantizing(make_config("moe"))
    assert reason
    assert "experts" in reason
