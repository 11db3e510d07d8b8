"""config.json of both families: written, read, and refused by name."""

import importlib
import json

import pytest

from pretrain_cli.errors import CheckpointError, ConfigError, PretrainError
from pretrain_cli.model.config import variant
from pretrain_cli.model.formats.hf_config import from_config_json, read_config, to_config_json
from pretrain_cli.model.presets import PRESETS, preset
from tests.model.formats.test_hf_weights import LINEAR

REFUSED = {
    "biases": ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    "dropout": ("qwen3", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    "capped logits": ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
    "capped scores": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50"),
    "two-way": (
        "gemma3",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention is True",
    ),
    "sliding Qwen": ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
    "sliding Qwen by layer": (
        "qwen3",
        {"layer_types": ["sliding_attention"] + ["full_attention"] * 27},
        "sliding_attention layers",
    ),
    "shared expert": (
        "qwen3-30b-a3b",
        {"shared_expert_intermediate_size": 64},
        "shared_expert_intermediate_size is 64",
    ),
    "yarn": (
        "qwen3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
        "RoPE scaling 'yarn'",
    ),
    "yarn, base apart": (
        "qwen3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "RoPE scaling 'yarn'",
    ),
    "yarn in transformers 4": (
        "qwen3",
        {"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "RoPE scaling 'yarn'",
    ),
    "yarn, older still": (
        "qwen3",
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        "RoPE scaling 'yarn'",
    ),
    "dynamic Gemma": (
        "gemma3",
        {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e6}}},
        "RoPE scaling 'dynamic' of full_attention",
    ),
    "scaled sliding layers": (
        "gemma3",
        {"rope_parameters": {"sliding_attention": LINEAR | {"rope_theta": 1e4}}},
        "RoPE scaling of sliding layers",
    ),
    "one RoPE for both kinds": (
        "gemma3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        "rope_parameters of a Gemma 3",
    ),
    "another activation": ("qwen3", {"hidden_act": "gelu"}, "hidden_activation: 'gelu' is not"),
    "too few layer types": (
        "gemma3",
        {"layer_types": ["full_attention"]},
        "1 layer_types for 18 num_hidden_layers",
    ),
    "another family": ("qwen3", {"model_type": "llama"}, "model_type 'llama' is not one of gemma3"),
    "no family": ("qwen3", {"model_type": None}, "model_type 'None' is not one of gemma3"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_config_json(name):
    written = json.loads(json.dumps(to_config_json(preset(name), "bfloat16")))
    assert from_config_json(written) == preset(name)
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_the_presets_numbers_from_config_json(name, tmp_path):
    config = preset(name)
    (tmp_path / "config.json").write_text(json.dumps(to_config_json(config, "bfloat16")))
    theirs = importlib.import_module("transformers").AutoConfig.from_pretrained(tmp_path)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                  "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                  "rms_norm_eps", "initializer_range", "tie_word_embeddings", "pad_token_id",
                  "sliding_window"):  # fmt: skip
        assert getattr(theirs, field) == getattr(config, field), field
    # The mixture's config has no layer types: all its layers are full.
    assert tuple(getattr(theirs, "layer_types", config.layer_types)) == config.layer_types


def test_both_spellings_of_each_number_are_written():
    """transformers 4 and 5 use different names."""
    written = to_config_json(preset("gemma3-4b"), "float32")
    assert written["rope_theta"] == 1_000_000.0
    assert written["rope_local_base_freq"] == 10_000.0
    assert written["rope_scaling"] == LINEAR
    assert written["rope_parameters"] == {
        "full_attention": LINEAR | {"rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    assert written["sliding_window_pattern"] == 6
    assert written["layer_types"][:6] == ["sliding_attention"] * 5 + ["full_attention"]
    assert isinstance(written["query_pre_attn_scalar"], int)
    scaled = to_config_json(variant(preset("qwen3"), {"rope_scaling_factor": 8}), "float32")
    assert scaled["rope_scaling"] == LINEAR
    assert scaled["rope_parameters"] == LINEAR | {"rope_theta": 1_000_000.0}
    written = to_config_json(preset("qwen3-30b-a3b"), "float32")
    assert written["rope_theta"] == 1_000_000.0
    assert written["rope_scaling"] is None
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 1_000_000.0}
    assert written["num_experts"] == 128


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_unsupported_fields_are_refused_by_name(case, tmp_path):
    name, changes, message = case
    written = to_config_json(preset(name), "float32") | changes
    with pytest.raises(ConfigError) as error:
        from_config_json(written)
    assert message in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError) as error:  # the same message, with the folder's name
        read_config(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_unsupported_fields_of_a_text_config_are_refused():
    text = to_config_json(preset("gemma3-4b"), "float32") | {"final_logit_softcapping": 30.0}
    with pytest.raises(ConfigError, match="final_logit_softcapping is 30"):
        from_config_json({"model_type": "gemma3", "text_config": text})


@pytest.mark.parametrize(
    "field", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"]
)
def test_a_missing_size_is_named(field):
    written = to_config_json(preset("qwen3"), "float32")
    del written[field]
    with pytest.raises(PretrainError, match=f"'{field}' is missing"):
        from_config_json(written)
