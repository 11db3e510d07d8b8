"""The table from published names to our parameters: every name, and every number exactly once."""

import pytest
import torch

from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.parameter_map import EMBEDDING, HEAD, Merged, parameter_map

ATTENTION = {
    "self_attn.q_proj.weight": (64, 32),
    "self_attn.k_proj.weight": (32, 32),
    "self_attn.v_proj.weight": (32, 32),
    "self_attn.o_proj.weight": (32, 64),
    "self_attn.q_norm.weight": (16,),
    "self_attn.k_norm.weight": (16,),
    "input_layernorm.weight": (32,),
    "post_attention_layernorm.weight": (32,),
}
MLP = {
    "mlp.gate_proj.weight": (48, 32),
    "mlp.up_proj.weight": (48, 32),
    "mlp.down_proj.weight": (32, 48),
}
POST_NORMS = {
    "pre_feedforward_layernorm.weight": (32,),
    "post_feedforward_layernorm.weight": (32,),
}
EXPERTS = {"mlp.gate.weight": (8, 32)} | {
    f"mlp.experts.{e}.{name}.weight": shape
    for e in range(8)
    for name, shape in (("gate_proj", (24, 32)), ("up_proj", (24, 32)), ("down_proj", (32, 24)))
}
BLOCKS = {
    "gemma3": [ATTENTION | MLP | POST_NORMS] * 3,
    "qwen3": [ATTENTION | MLP] * 3,
    "moe": [ATTENTION | EXPERTS, ATTENTION | MLP, ATTENTION | EXPERTS],
}


@pytest.fixture(params=BLOCKS)
def family(request):
    return request.param


@pytest.fixture(
    params=[Merged(True, True), Merged(True, False), Merged(False, True), Merged(False, False)],
    ids=["merged", "qkv", "gate_up", "separate"],
)
def merged(request):
    return request.param


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_names_and_shapes_are_as_published(make_config, family, merged, tied):
    expected = {"model.embed_tokens.weight": (60, 32), "model.norm.weight": (32,)}
    expected |= {} if tied else {"lm_head.weight": (60, 32)}
    for i, block in enumerate(BLOCKS[family]):
        expected |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    pieces = list(parameter_map(make_config(family, tie_word_embeddings=tied), merged=merged))
    assert {piece.name: piece.shape for piece in pieces} == expected
    assert len(pieces) == len(expected)


def test_every_number_of_every_parameter_is_in_one_piece(make_config, family, merged):
    model = Decoder(make_config(family), merged=merged)
    times = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for piece in parameter_map(model.config, merged=merged):
        part = piece.of(times[piece.parameter])
        assert tuple(part.shape) == piece.shape
        part += 1
    for name, counted in times.items():
        assert (counted == 1).all(), name


def test_merging_projections_changes_no_name_and_no_order(make_config, family):
    both = [
        [(p.name, p.shape) for p in parameter_map(make_config(family), merged=merged)]
        for merged in (Merged(True, True), Merged(False, False))
    ]
    assert both[0] == both[1]


def test_norms_are_distinguished_from_matrices(make_config, family):
    norms = {p.name for p in parameter_map(make_config(family), merged=Merged()) if p.is_norm}
    assert norms == {
        p.name for p in parameter_map(make_config(family), merged=Merged()) if "norm" in p.name
    }


@pytest.mark.parametrize(
    ("family", "ours"), [("gemma3", "post_attention_norm"), ("qwen3", "mlp_norm")]
)
def test_post_attention_layernorm_means_two_norms(make_config, family, ours):
    """It follows attention in Gemma 3 and precedes the MLP in Qwen 3."""
    found = [
        p.parameter
        for p in parameter_map(make_config(family), merged=Merged())
        if p.name == "model.layers.1.post_attention_layernorm.weight"
    ]
    assert found == [f"blocks.1.{ours}.weight"]


def test_the_names_of_embedding_and_head_are_the_published_ones():
    assert EMBEDDING == "model.embed_tokens.weight"
    assert HEAD == "lm_head.weight"
