"""The mixture of experts against a loop over tokens and their experts."""

import pytest
import torch
import torch.nn.functional as F

from pretrain_cli.model.moe import MixtureOfExperts


@pytest.fixture
def build(make_config, wide):
    def make(**changes):
        layer = MixtureOfExperts(make_config("moe", **changes))
        wide(layer)
        return layer

    return make


def token_by_token(layer, x):
    """Sum each chosen expert's down(silu(gate) · up), times its weight, one token at a time."""
    out = torch.zeros_like(x)
    for b, t in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
        row = x[b, t]
        probabilities = torch.softmax(layer.router.weight @ row, dim=0)
        weights, chosen = probabilities.topk(layer.chosen)
        if layer.normalized:
            weights = weights / weights.sum()
        for weight, e in zip(weights, chosen.tolist(), strict=True):
            gate, up = (layer.gate_up[e] @ row).chunk(2)
            out[b, t] = out[b, t] + weight * (layer.down[e] @ (F.silu(gate) * up))
    return out


@pytest.fixture
def x():
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("chosen", [1, 3, 8])
@pytest.mark.parametrize("normalized", [True, False])
def test_each_token_gets_its_experts_weighted_by_the_router(build, x, normalized, chosen):
    layer = build(norm_topk_prob=normalized, num_experts_per_tok=chosen)
    ours, expected = layer(x)[0], token_by_token(layer, x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    pull = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    mine = torch.autograd.grad(ours, list(layer.parameters()), pull)
    theirs = torch.autograd.grad(expected, list(layer.parameters()), pull)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalized", [True, False])
def test_weights_sum_to_one_only_if_normalized(build, x, normalized):
    layer = build(norm_topk_prob=normalized)
    weights, experts = layer.choose(layer.router(x.flatten(0, 1)).softmax(-1))
    assert weights.shape == experts.shape == (10, 3)
    sums = weights.sum(-1)
    if normalized:
        torch.testing.assert_close(sums, torch.ones(10))
    else:
        assert (sums < 0.999).all()


def test_the_chosen_experts_are_those_of_the_largest_probability(build):
    layer = build()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.tensor([0.0, 3.0, 1.0, 7.0, 2.0, 6.0, 5.0, 4.0])
    _, experts = layer.choose(layer.router(torch.eye(32)[:1]).softmax(-1))
    assert experts.tolist() == [[3, 5, 6]]


def test_experts_that_no_token_chose_get_no_gradient(build):
    layer = build(num_experts_per_tok=2)
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(2))
    chosen = layer.choose(layer.router(x[0]).softmax(-1))[1].flatten().tolist()
    layer(x)[0].square().sum().backward()
    reached = layer.down.grad.flatten(1).any(1).nonzero().flatten().tolist()
    assert reached == sorted(chosen)


def test_all_tokens_may_choose_the_same_expert(build, x):
    """Experts have no capacity limit, so no token is dropped."""
    layer = build(num_experts_per_tok=1)
    same = x[:1, :1].expand(2, 5, 32).contiguous()
    out, _ = layer(same)
    torch.testing.assert_close(out, token_by_token(layer, same), rtol=1e-5, atol=1e-6)
    assert out.flatten(0, 1).norm(dim=1).min() > 0


def test_bfloat16_tokens_work_with_float32_experts(build, x, relative_error):
    layer = build()
    out, _ = layer(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert relative_error(out, layer(x)[0]) < 0.03
