"""Fields of config.json in the spellings of transformers 4 and 5."""

import pytest

from pretrain_cli.model.config import FULL, SLIDING
from pretrain_cli.model.formats.hf_config import from_config_json, to_config_json
from pretrain_cli.model.presets import preset

ROPE_OF_GEMMA = {
    "transformers 4": {
        "rope_theta": 3e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "transformers 4, older still": {
        "rope_theta": 3000000,
        "rope_local_base_freq": 20000,
        "rope_scaling": {"type": "linear", "factor": 4},
    },
    "transformers 5": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    },
    "one base in each": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e6}
        },
        "rope_local_base_freq": 2e4,
    },
}
ROPE_OF_QWEN = {
    "transformers 4": {
        "rope_theta": 3e6,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "transformers 5": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e6}
    },
    "base and scaling apart": {
        "rope_theta": 3e6,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
    },
}


def without_rope(name):
    written = to_config_json(preset(name), "float32")
    return {k: v for k, v in written.items() if not k.startswith("rope_")}


@pytest.mark.parametrize("spelling", ROPE_OF_GEMMA.values(), ids=ROPE_OF_GEMMA)
def test_gemma_rope_is_read_in_every_spelling(spelling):
    config = from_config_json(without_rope("gemma3") | spelling)
    assert config.rope_base(FULL) == (3e6, 4.0)
    assert config.rope_base(SLIDING) == (2e4, 1.0)


@pytest.mark.parametrize("spelling", ROPE_OF_QWEN.values(), ids=ROPE_OF_QWEN)
def test_qwen_rope_is_read_in_every_spelling(spelling):
    assert from_config_json(without_rope("qwen3") | spelling).rope_base(FULL) == (3e6, 4.0)


def test_the_number_of_experts_is_read_in_both_spellings():
    written = to_config_json(preset("qwen3-30b-a3b"), "float32")
    written["num_local_experts"] = written.pop("num_experts")
    assert from_config_json(written) == preset("qwen3-30b-a3b")


def test_missing_layer_types_are_derived_from_the_pattern():
    written = to_config_json(preset("gemma3-1b"), "float32")
    del written["layer_types"]
    assert from_config_json(written) == preset("gemma3-1b")
    written["sliding_window_pattern"] = 3
    expected = tuple(FULL if i % 3 == 2 else SLIDING for i in range(26))
    assert from_config_json(written).layer_types == expected


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "qwen3-30b-a3b"])
def test_a_null_field_equals_a_missing_field(name):
    """Also in nested configs: transformers writes null for many unset fields."""
    written = to_config_json(preset(name), "float32")
    for optional in ("rope_parameters", "use_bidirectional_attention", "attention_bias",
                     "sliding_window_pattern", "use_sliding_window"):  # fmt: skip
        written[optional] = None
    assert from_config_json(written) == preset(name)
    if name == "gemma3":
        assert from_config_json({"model_type": "gemma3", "text_config": written}) == preset(name)


def test_a_null_padding_token_overrides_gemmas_default():
    written = to_config_json(preset("gemma3"), "float32")
    assert from_config_json(written | {"pad_token_id": None}).pad_token_id is None
    del written["pad_token_id"]
    assert from_config_json(written).pad_token_id == 0
