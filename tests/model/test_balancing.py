"""The balancing loss of experts against transformers': its value and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from pretrain_cli.errors import ConfigError
from pretrain_cli.model.config import variant
from pretrain_cli.model.decoder import Decoder, LossWeights
from pretrain_cli.model.formats.hf_config import read_config
from pretrain_cli.model.formats.hf_weights import load_weights
from pretrain_cli.model.presets import preset

MIXTURES = ["moe-normalized", "moe-unnormalized"]
COEFFICIENT = 0.7  # large enough to be seen in every gradient


@pytest.fixture(params=MIXTURES)
def pair(request, make_transformers_model, tmp_path):
    """Return a model of transformers and its folder."""
    model = make_transformers_model(request.param)
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_minimized_loss_and_every_gradient_equal_transformers(
    pair, padded, checkpointing, our_gradients, relative_error
):
    theirs, folder = pair
    tokens = torch.randint(1, 150, (3, 21), generator=torch.Generator().manual_seed(2))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    if padded:
        targets[0, 13:] = targets[2, 4:] = -100
    seen = (targets != -100).long()
    out = theirs(
        inputs, attention_mask=seen if padded else None, output_router_logits=True, use_cache=False
    )
    entropy = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    (entropy + COEFFICIENT * out.aux_loss).backward()

    model = Decoder(read_config(folder), activation_checkpointing=checkpointing)
    load_weights(model, folder)
    ours = model(inputs, targets, loss_weights=LossWeights(0.0, COEFFICIENT))
    ours.minimized.backward()

    torch.testing.assert_close(ours.cross_entropy, entropy.detach(), rtol=1e-6, atol=0)
    balancing = COEFFICIENT * out.aux_loss.detach()
    torch.testing.assert_close(ours.balancing, balancing, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.minimized, entropy + balancing, rtol=1e-6, atol=0)
    layers = sum(model.config.is_sparse(i) for i in range(model.config.num_hidden_layers))
    assert ours.choices.shape == (layers, 8)
    assert (ours.choices.sum(1) == seen.sum() * model.config.num_experts_per_tok).all()
    gradients = our_gradients(model)
    for name, parameter in theirs.named_parameters():
        if ".experts." not in name:
            assert relative_error(gradients[name], parameter.grad) < 5e-5, name


def test_a_uniform_router_has_a_loss_of_experts_per_token(make_config):
    """The router's weights are zero: every probability is 1/E, whichever experts are chosen."""
    config = make_config("moe", num_experts_per_tok=3)
    model = Decoder(config)
    model.initialize(0)
    with torch.no_grad():
        for block in model.blocks:
            if hasattr(block.mlp, "router"):
                block.mlp.router.weight.zero_()
    tokens = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(2))
    terms = model(tokens, tokens, loss_weights=LossWeights(0.0, 1.0))
    assert terms.balancing.item() == pytest.approx(3.0)


def test_a_dense_model_has_a_z_loss_and_no_balancing_loss(make_config, wide):
    model = Decoder(make_config("gemma3"))
    wide(model)
    tokens = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(2))
    terms = model(tokens, tokens, loss_weights=LossWeights(0.1, 0.0))
    z = model(tokens).logsumexp(-1).square().mean()
    torch.testing.assert_close(terms.z_loss, 0.1 * z.detach(), rtol=1e-5, atol=0)
    assert terms.balancing.item() == 0
    assert terms.choices is None


@pytest.mark.parametrize(
    ("name", "coefficient", "said"),
    [
        ("qwen3-tiny", 0.1, "0.1 with no experts to balance"),
        ("qwen3-30b-a3b", -0.1, "-0.1 is not 0 or more"),
        ("qwen3-30b-a3b", float("nan"), "nan is not 0 or more"),
    ],
)
def test_an_invalid_balancing_coefficient_is_refused(name, coefficient, said):
    with pytest.raises(ConfigError, match=f"model.router_aux_loss_coef: {said}"):
        variant(preset(name), {"router_aux_loss_coef": coefficient})
