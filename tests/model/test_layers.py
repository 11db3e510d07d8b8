"""Norms by hand arithmetic, known values of activations, merged and separate projections."""

import pytest
import torch
import torch.nn.functional as F

from pretrain_cli.model.layers import GatedMLP, Linear, Projections, RMSNorm, activate


@pytest.fixture
def norm(make_config):
    def make(family, weight, eps=1e-6):
        layer = RMSNorm(len(weight), make_config(family, rms_norm_eps=eps))
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(weight))
        return layer

    return make


def test_a_norm_divides_by_the_root_of_the_mean_square(norm):
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0]])  # mean square 25 / 4, so root 2.5
    out = norm("qwen3", [1.0, 1.0, 1.0, 1.0])(x)
    torch.testing.assert_close(out, torch.tensor([[1.2, -1.6, 0.0, 0.0]]))


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_eps_is_added_to_the_mean_square_inside_the_root(norm, family):
    weight = [0.0, 0.0] if family == "gemma3" else [1.0, 1.0]
    x = torch.full((1, 2), 1e-3)  # its mean square is eps, so the norm is 1 / √2
    torch.testing.assert_close(norm(family, weight)(x), torch.full((1, 2), 0.5**0.5))


def test_gemma_stores_its_norm_weights_minus_one(norm):
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0]])
    out = norm("gemma3", [0.0, 1.0, 0.5, 0.0])(x)
    torch.testing.assert_close(out, torch.tensor([[1.2, -3.2, 0.0, 0.0]]))


def test_families_round_in_their_own_order_in_bfloat16(norm):
    """Gemma multiplies in float32 and rounds once; Qwen rounds, then multiplies."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=generator).bfloat16()
    weight = torch.rand(8, generator=generator).add(0.5).bfloat16()
    unit = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    gemma = norm("gemma3", (weight.float() - 1).tolist())(x)
    qwen = norm("qwen3", weight.float().tolist())(x)
    assert torch.equal(gemma, (unit * weight.float()).bfloat16())
    assert torch.equal(qwen, unit.bfloat16() * weight)
    assert not torch.equal(gemma, qwen)


def test_activations_are_silu_and_the_tanh_approximation_of_gelu():
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    silu = torch.tensor([-0.2689414, 0.0, 0.7310586, 1.7615942])
    gelu = torch.tensor([-0.1588080, 0.0, 0.8411920, 1.9545977])
    torch.testing.assert_close(activate("silu", x), silu)
    torch.testing.assert_close(activate("gelu_pytorch_tanh", x), gelu, rtol=0, atol=2e-7)


def test_the_exact_gelu_has_other_values():
    """The test above can thus distinguish the two: erf gives 0.8413447 and 1.9544997."""
    x = torch.tensor([1.0, 2.0])
    assert (activate("gelu_pytorch_tanh", x) - F.gelu(x)).abs().min() > 5e-5


def test_merged_projections_equal_separate_ones():
    rows = {"q_proj": 6, "k_proj": 2, "v_proj": 2}
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    merged, apart = Projections(5, rows, merged=True), Projections(5, rows, merged=False)
    with torch.no_grad():
        merged.weight.normal_(generator=torch.Generator().manual_seed(2))
        for name, part in zip(rows, merged.weight.split([6, 2, 2]), strict=True):
            apart.get_submodule(name).weight.copy_(part)
    for a, b, width in zip(merged(x), apart(x), (6, 2, 2), strict=True):
        assert a.shape == (3, 4, width)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "separate"])
def test_only_the_gate_goes_through_the_activation(make_config, merged):
    mlp = GatedMLP(make_config("qwen3", hidden_size=2, intermediate_size=1), merged=merged)
    with torch.no_grad():
        gate, up = (
            mlp.gate_up.weight.split(1)
            if merged
            else (mlp.gate_up.gate_proj.weight, mlp.gate_up.up_proj.weight)
        )
        gate.copy_(torch.tensor([[1.0, 0.0]]))
        up.copy_(torch.tensor([[0.0, 1.0]]))
        mlp.down.weight.copy_(torch.tensor([[1.0], [10.0]]))
    out = mlp(torch.tensor([[1.0, 3.0]]))  # silu(1) · 3
    torch.testing.assert_close(out, torch.tensor([[2.1931758, 21.931758]]))


def test_a_float32_weight_computes_in_the_type_of_its_input():
    layer = Linear(4, 3)
    torch.nn.init.ones_(layer.weight)
    assert layer(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32
