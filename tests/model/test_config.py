"""ModelConfig has no defaults, refuses impossible models, and changes fields by name."""

import dataclasses

import pytest

from pretrain_cli.errors import ConfigError
from pretrain_cli.model.config import FULL, SLIDING, ModelConfig, variant
from pretrain_cli.model.presets import PRESETS, preset


def test_no_field_has_a_default():
    """A default would let one size inherit another's number."""
    for field in dataclasses.fields(ModelConfig):
        assert field.default is dataclasses.MISSING, field.name
        assert field.default_factory is dataclasses.MISSING, field.name


def test_a_config_is_frozen(make_config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config().hidden_size = 1


def test_sliding_layers_have_their_own_window_and_rope_base(make_config):
    config = make_config(sliding_window=7, rope_local_base_freq=50.0, rope_theta=5000.0)
    assert config.window(SLIDING) == 7
    assert config.window(FULL) is None
    assert config.rope_base(SLIDING) == (50.0, 1.0)  # never scaled
    assert config.rope_base(FULL) == (5000.0, 8.0)


def test_the_attention_scale_is_one_over_the_root_of_its_scalar():
    assert preset("gemma3-270m").attention_scale == 1 / 16  # 1 / √256
    assert preset("gemma3-27b").attention_scale == pytest.approx(0.0771517)  # 1 / √168
    assert preset("qwen3-0.6b").attention_scale == pytest.approx(0.0883883)  # 1 / √128


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"mlp_only_layers": (1, 4)}, [0, 2, 3, 5]),
        ({"decoder_sparse_step": 2}, [1, 3, 5]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": (3,)}, [1, 5]),
    ],
)
def test_a_layer_is_sparse_by_step_unless_listed(make_config, changes, sparse):
    config = make_config("moe", **{"layer_types": (FULL,) * 6, "mlp_only_layers": ()} | changes)
    assert [i for i in range(6) if config.is_sparse(i)] == sparse


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma3", {"vocab_size": 0}, "model.vocab_size: 0 is not above zero"),
        ("gemma3", {"rms_norm_eps": 0.0}, "model.rms_norm_eps: 0.0 is not above zero"),
        ("gemma3", {"rope_theta": -1.0}, "model.rope_theta: -1.0 is not above zero"),
        (
            "gemma3",
            {"model_type": "gemma2"},
            "model.model_type: 'gemma2' is not one of",
        ),
        ("gemma3", {"hidden_activation": "relu"}, "model.hidden_activation: 'relu' is not one of"),
        ("gemma3", {"layer_types": ()}, "model.layer_types: empty"),
        ("gemma3", {"layer_types": ("chunked",)}, "model.layer_types: 'chunked' is not one of"),
        ("gemma3", {"sliding_window": None}, "model.sliding_window: None with sliding layers"),
        ("gemma3", {"sliding_window": 0}, "model.sliding_window: 0 with sliding layers"),
        ("gemma3", {"num_key_value_heads": 3}, "model.num_key_value_heads: 3 does not divide"),
        ("gemma3", {"pad_token_id": 60}, "model.pad_token_id: 60 is not in a vocabulary of 60"),
        ("gemma3", {"head_dim": 15}, "model.head_dim: 15 is odd"),
        ("gemma3", {"hidden_size": 34}, "model.hidden_size: 34 is not a multiple of"),
        ("gemma3", {"has_post_norms": False}, "model.has_post_norms: False does not go with"),
        ("gemma3", {"rope_local_base_freq": None}, "model.rope_local_base_freq: None does not go"),
        ("gemma3", {"num_experts": 4}, "model.num_experts: 4 does not go with gemma3_text"),
        ("qwen3", {"norm_is_zero_centered": True}, "model.norm_is_zero_centered: True does not"),
        ("qwen3", {"embedding_is_scaled": True}, "model.embedding_is_scaled: True does not go"),
        ("qwen3", {"rope_local_base_freq": 1e4}, "model.rope_local_base_freq: 10000.0 does not"),
        ("qwen3", {"query_pre_attn_scalar": 32}, "model.query_pre_attn_scalar: 32, but qwen3"),
        (
            "qwen3",
            {"layer_types": (FULL, SLIDING), "sliding_window": 4},
            "model.layer_types: sliding_attention does not go with qwen3",
        ),
        ("moe", {"num_experts": 0}, "model.num_experts: 0 does not go with qwen3_moe"),
        ("moe", {"num_experts_per_tok": 9}, "model.num_experts_per_tok: 9 is not between 1 and"),
        ("moe", {"num_experts_per_tok": 0}, "model.num_experts_per_tok: 0 is not between 1 and"),
        ("moe", {"moe_intermediate_size": 0}, "model.moe_intermediate_size: 0 is not above zero"),
        ("moe", {"moe_intermediate_size": 25}, "model.moe_intermediate_size: 25 is not a multiple"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else None,
)
def test_impossible_models_are_refused_by_name(make_config, family, changes, message):
    with pytest.raises(ConfigError) as error:
        make_config(family, **changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", PRESETS)
def test_a_variant_without_changes_equals_its_preset(name):
    assert variant(preset(name), {}) == preset(name)


def test_a_variant_changes_only_the_named_fields():
    changed = variant(preset("gemma3"), {"vocab_size": 4096, "rope_theta": 10_000})
    assert (changed.vocab_size, changed.rope_theta) == (4096, 10_000.0)
    back = {"vocab_size": 262_144, "rope_theta": 1_000_000.0}
    assert variant(changed, back) == preset("gemma3")


def test_variant_does_not_modify_its_argument():
    changes = {"num_hidden_layers": 2, "vocab_size": "4096"}
    variant(preset("gemma3"), changes)
    assert changes == {"num_hidden_layers": 2, "vocab_size": "4096"}


@pytest.mark.parametrize(
    ("name", "depth", "full"), [("gemma3-270m", 13, [5, 11]), ("gemma3-1b", 4, []),
                                ("gemma3-tiny", 12, [5, 11]), ("qwen3-0.6b", 3, [0, 1, 2])]
)  # fmt: skip
def test_another_depth_repeats_the_pattern_of_layers(name, depth, full):
    types = variant(preset(name), {"num_hidden_layers": depth}).layer_types
    assert types == tuple(FULL if i in full else SLIDING for i in range(depth))


def test_depth_and_layer_types_must_agree_if_both_are_given():
    both = {"num_hidden_layers": 3, "layer_types": [FULL, SLIDING]}
    with pytest.raises(ConfigError, match=r"num_hidden_layers: 3, but layer_types has 2"):
        variant(preset("gemma3"), both)
    agreed = variant(preset("gemma3"), both | {"num_hidden_layers": 2})
    assert agreed.layer_types == (FULL, SLIDING)


def test_qwen_attention_scale_follows_head_dim_gemma_keeps_its_own():
    assert variant(preset("qwen3"), {"head_dim": 64}).query_pre_attn_scalar == 64
    assert variant(preset("gemma3"), {"head_dim": 64}).query_pre_attn_scalar == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 3}, "model.hiden_size: no such setting; did you mean model.hidden_size?"),
        (
            {"num_layers": 3},
            "model.num_layers: no such setting; did you mean model.num_hidden_layers?",
        ),
        ({"zzzz": 3}, "model.zzzz: no such setting"),
        ({"hidden_size": "wide"}, "model.hidden_size: 'wide' is not a whole number"),
        ({"hidden_size": 1.5}, "model.hidden_size: 1.5 is not a whole number"),
        ({"hidden_size": True}, "model.hidden_size: True is not a whole number"),
        ({"rope_theta": "high"}, "model.rope_theta: 'high' is not a number"),
        ({"tie_word_embeddings": "maybe"}, "model.tie_word_embeddings: 'maybe' is not true or"),
        ({"num_hidden_layers": 0}, "model.num_hidden_layers: 0 is not above zero"),
        ({"num_hidden_layers": "deep"}, "model.num_hidden_layers: 'deep' is not a whole number"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split(":")[0],
)
def test_a_wrong_change_is_refused_with_the_accepted_values(changes, message):
    with pytest.raises(ConfigError) as error:
        variant(preset("gemma3"), changes)
    assert str(error.value).startswith(message)
