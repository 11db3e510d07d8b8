"""AdamW against PyTorch's AdamW on each separate published tensor, and weight decay by group."""

import pytest
import torch

from pretrain_cli.engine.optim.optimizer import build_optimizer, set_rates
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.errors import ConfigError
from tests.engine.jobs import recipe_of


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_each_group_equals_torchs_adamw_at_its_own_rate_and_decay(
    tiny_model, published, give_gradients, tied, fused
):
    model = tiny_model(tie_word_embeddings=tied).double()
    recipe = recipe_of(
        model,
        betas=(0.8, 0.97),
        eps=1e-3,
        weight_decay=0.3,
        embedding_rate_scale=3.0,
        head_rate_scale=0.5,
        norm_rate_scale=0.25,
    )
    references = {}
    for name, view in published(model).items():
        apart = view.detach().clone().requires_grad_()
        scale = {"model.embed_tokens.weight": 3.0, "lm_head.weight": 0.5}.get(name, 1.0)
        scale = 0.25 if "norm" in name else scale
        decay = 0.0 if "norm" in name else 0.3
        references[name] = apart, torch.optim.AdamW(
            [apart], lr=0.01 * scale, betas=(0.8, 0.97), eps=1e-3, weight_decay=decay,
            foreach=False, fused=False,
        )  # fmt: skip
    optimizer = build_optimizer(model, recipe, fused=fused)
    for step in range(4):
        give_gradients(model, step)
        for name, gradient in published(model, "grad").items():
            apart, reference = references[name]
            apart.grad = gradient
            reference.step()
        set_rates(optimizer, StepRates(0.01))
        optimizer.step()
    for name, view in published(model).items():
        torch.testing.assert_close(view, references[name][0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["gemma3-tiny", "qwen3-tiny", "qwen3-30b-a3b"])
def test_every_parameter_is_in_one_group(tiny_model, name):
    model = tiny_model(name)
    groups = build_optimizer(model, recipe_of(model), fused=True).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_matrices_are_decayed_and_norms_are_not(tiny_model):
    model = tiny_model()
    groups = build_optimizer(model, recipe_of(model), fused=True).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == ("norm" not in name), name


def test_head_rate_scale_is_refused_for_a_tied_head(settings, run):
    with pytest.raises(ConfigError, match=r"optimizer.head_rate_scale: 2.0, and this model's head"):
        run(settings(optimizer__head_rate_scale=2.0))
