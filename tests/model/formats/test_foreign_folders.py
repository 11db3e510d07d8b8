"""Model folders of every published layout: reproduced up to rounding, or refused by name.

Each folder is written by transformers from a small random configuration. Our logits are compared
with transformers' own.
"""

import dataclasses
import importlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain_cli.errors import CheckpointError, ConfigError
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats import hf_fields
from pretrain_cli.model.formats.hf_config import from_config_json, read_config, to_config_json
from pretrain_cli.model.formats.hf_weights import load_weights, say_left_out
from pretrain_cli.model.presets import preset

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
GEMMA = SIZES | {"num_hidden_layers": 7, "query_pre_attn_scalar": 20, "sliding_window": 7}
QWEN = SIZES | {"num_hidden_layers": 3, "tie_word_embeddings": False}
MOE = QWEN | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "image_size": 28,
    "num_attention_heads": 2, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def linear(**more):
    return {"rope_type": "linear", "factor": 4.0} | more


def written(tmp_path, wide, family, numbers, *, dtype=torch.float32, shards="5GB"):
    """Write a folder with transformers; its weights are drawn wide."""
    transformers = importlib.import_module("transformers")
    name = {"gemma3": "Gemma3TextConfig", "qwen3": "Qwen3Config", "moe": "Qwen3MoeConfig"}[family]
    causal = {"gemma3": "Gemma3", "qwen3": "Qwen3", "moe": "Qwen3Moe"}[family] + "ForCausalLM"
    config = getattr(transformers, name)(**numbers)
    model = getattr(transformers, causal)(config)
    wide(model)
    model.to(dtype).save_pretrained(tmp_path, max_shard_size=shards)
    return tmp_path


def theirs(folder, tokens):
    """Return transformers' logits of a folder, in float32 with eager attention."""
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def ours(folder, tokens):
    model = Decoder(read_config(folder))
    load_weights(model, folder)
    with torch.no_grad():
        return model(tokens)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def tokens():
    return torch.randint(0, 60, (2, 30), generator=torch.Generator().manual_seed(0))


REPRODUCED = {
    "gemma, several shards": ("gemma3", {}, {"shards": "20KB"}),
    "gemma in bfloat16": ("gemma3", {}, {"dtype": torch.bfloat16}),
    "gemma in float16": ("gemma3", {}, {"dtype": torch.float16}),
    "gemma scaled": (
        "gemma3",
        {"rope_parameters": {"full_attention": linear(rope_theta=5e3),
                             "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
        {},
    ),
    "gemma of full layers alone": ("gemma3", {"layer_types": ["full_attention"] * 7}, {}),
    "gemma with a pattern of its own": ("gemma3", {"sliding_window_pattern": 3}, {}),
    "gemma of one key head": ("gemma3", {"num_key_value_heads": 1}, {}),
    "gemma untied": ("gemma3", {"tie_word_embeddings": False}, {}),
    "qwen tied": ("qwen3", {"tie_word_embeddings": True}, {}),
    "qwen scaled": ("qwen3", {"rope_parameters": linear(rope_theta=3e3)}, {}),
    "qwen with a head a key": ("qwen3", {"num_key_value_heads": None}, {}),
    "qwen, heads narrower than the model": ("qwen3", {"head_dim": 4}, {"shards": "20KB"}),
    "moe, several shards in bfloat16": ("moe", {"norm_topk_prob": True},
                                        {"shards": "30KB", "dtype": torch.bfloat16}),
    "moe, dense layers by number": ("moe", {"mlp_only_layers": [0, 2]}, {}),
    "moe, dense layers by step": ("moe", {"decoder_sparse_step": 2}, {}),
    "moe, by number and by step": ("moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1],
                                           "num_hidden_layers": 4}, {}),
    "moe, head size by division": ("moe", {"head_dim": 8}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", REPRODUCED.values(), ids=REPRODUCED)
def test_folders_written_by_transformers_have_the_same_logits(
    case, wide, tokens, tmp_path, relative_error
):
    family, changes, how = case
    numbers = {"gemma3": GEMMA, "qwen3": QWEN, "moe": MOE}[family]
    folder = written(tmp_path, wide, family, numbers | changes, **how)
    assert len(list(folder.glob("*.safetensors"))) > 1 or "shards" not in how
    assert relative_error(ours(folder, tokens), theirs(folder, tokens)) < 2e-5


def test_a_mixtures_missing_head_dim_is_hidden_size_over_heads(
    wide, tokens, tmp_path, relative_error
):
    folder = written(tmp_path, wide, "moe", MOE | {"head_dim": 8})
    config = json.loads((folder / "config.json").read_text())
    del config["head_dim"]
    (folder / "config.json").write_text(json.dumps(config))
    assert relative_error(ours(folder, tokens), theirs(folder, tokens)) < 2e-5


@pytest.mark.parametrize("shards", ["5GB", "40KB"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_text_of_a_multimodal_folder_has_the_same_logits(
    tied, shards, wide, tokens, tmp_path, relative_error
):
    transformers = importlib.import_module("transformers")
    config = transformers.Gemma3Config(
        text_config=GEMMA | {"tie_word_embeddings": tied}, vision_config=VISION,
        mm_tokens_per_image=4, image_token_index=63, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    wide(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size=shards)
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
    assert relative_error(ours(tmp_path, tokens), expected) < 2e-5

    left_out = load_weights(Decoder(read_config(tmp_path)), tmp_path)
    said = say_left_out(tmp_path, left_out)
    towers = sum(name.startswith("vision_tower.") for name in left_out)
    assert towers > 20
    assert f"vision_tower.* ({towers})" in said
    assert "multi_modal_projector.* (2)" in said
    assert said.count("(") == 2


# --- config.json, changed by hand -----------------------------------------------------------------

REFUSED = {
    "YaRN as Qwen documents it": ("qwen3", {"rope_scaling": YARN}, "RoPE scaling 'yarn'"),
    "YaRN over what is there": (
        "gemma3",
        {"rope_scaling": YARN},
        "RoPE scaling 'yarn' of full_attention",
    ),
    "a scaling that contradicts": (
        "qwen3",
        {"rope_scaling": linear()},
        "two values for the RoPE scaling of full_attention layers, 4.0 and 1.0",
    ),
    "a base that contradicts": (
        "gemma3",
        {"rope_theta": 77.0},
        "two values for the RoPE base of full_attention layers, 77.0 and",
    ),
    "a local base that contradicts": (
        "gemma3",
        {"rope_local_base_freq": 77.0},
        "two values for the RoPE base of sliding_attention layers, 77.0 and",
    ),
    "part of a head": ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "part of a head, within": (
        "qwen3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5",
    ),
    "sections": ("qwen3", {"rope_scaling": {"mrope_section": [2, 3, 3]}}, "RoPE's mrope_section"),
    "quantized": ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits'"),
    "code of its own": ("qwen3", {"auto_map": {"AutoModel": "m.M"}}, "auto_map is"),
    "unknown": ("qwen3", {"attention_sinks": 4}, "attention_sinks is 4, a field that this decoder"),
    "another family's": ("gemma3", {"hidden_act": "gelu"}, "hidden_act is gelu, a field"),
    "experts in a dense model": ("qwen3", {"num_experts": 8}, "num_experts is 8, a field"),
    "two numbers of experts": ("moe", {"num_experts": 4}, "num_local_experts differ"),
    "a layer type too many": (
        "qwen3",
        {"layer_types": ["full_attention"] * 4},
        "4 layer_types for 3 num_hidden_layers",
    ),
    "no size": ("qwen3", {"hidden_size": None}, "hidden_size is null"),
    "no window": ("gemma3", {"sliding_window": None}, "model.sliding_window: None with sliding"),
    "a size that is none": ("qwen3", {"hidden_size": 32.5}, "hidden_size: 32.5 is not a whole"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_unsupported_or_contradictory_fields_are_refused_by_name(case, wide, tmp_path):
    family, changes, said = case
    numbers = {"gemma3": GEMMA, "qwen3": QWEN, "moe": MOE}[family]
    folder = written(tmp_path, wide, family, numbers)
    read_config(folder)
    edit(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        read_config(folder)
    assert said in str(error.value)


def test_contradictory_tying_in_a_multimodal_config_is_refused():
    text = to_config_json(preset("gemma3-4b"), "float32")
    outer = {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False}
    with pytest.raises(
        ConfigError, match="tie_word_embeddings is False beside text_config and True"
    ):
        from_config_json(outer)


def test_multimodal_config_fields_outside_the_text_part_are_read():
    text = to_config_json(preset("gemma3-4b"), "float32")
    outer = {"model_type": "gemma3", "text_config": text, "quantization_config": {"bits": 8}}
    with pytest.raises(ConfigError, match="quantization_config is"):
        from_config_json(outer)


CONFIGS = {
    "gemma3_text": "Gemma3TextConfig", "qwen3": "Qwen3Config", "qwen3_moe": "Qwen3MoeConfig",
    "gemma3": "Gemma3Config",
}  # fmt: skip


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_transformers_config_field_is_read_or_harmless(model_type):
    """A field added by a later version must be classified before folders with it can be read."""
    config = getattr(importlib.import_module("transformers"), CONFIGS[model_type])
    names = {field.name for field in dataclasses.fields(config)} | set(config().to_dict())
    harmless = set().union(*hf_fields.HARMLESS.values())
    harmless |= hf_fields.OF_ONE_KIND.get(model_type, set())
    kinds = [hf_fields.READ[model_type], set(hf_fields.PLAIN), harmless]
    for name in names:
        assert sum(name in kind for kind in kinds) == 1, name


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3", "qwen3_moe"])
def test_every_field_that_is_read_changes_the_model(model_type):
    """Every field listed as read is used by from_config_json."""

    changed = {
        "vocab_size": 70, "hidden_size": 64, "intermediate_size": 56, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": 99, "rms_norm_eps": 1e-4, "initializer_range": 0.3,
        "tie_word_embeddings": model_type != "gemma3_text", "pad_token_id": 7, "rope_theta": 55.0,
        "rope_scaling": linear(), "sliding_window": 9, "query_pre_attn_scalar": 33,
        "sliding_window_pattern": 2, "rope_local_base_freq": 66.0, "num_local_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
        "router_aux_loss_coef": 0.5, "decoder_sparse_step": 2, "mlp_only_layers": [0],
        "hidden_activation": "silu", "hidden_act": "gelu_pytorch_tanh",
        "layer_types": ["full_attention"] * 3 if model_type == "gemma3_text" else None,
        "num_experts": 4,
        "rope_parameters": {"full_attention": linear(), "sliding_attention": {}}
        if model_type == "gemma3_text" else linear(),
    }  # fmt: skip
    base = SIZES | {"model_type": model_type, "num_hidden_layers": 3}
    if model_type == "qwen3_moe":
        base |= {"num_experts_per_tok": 3}
    before = from_config_json(base)
    for name in hf_fields.READ[model_type] - {"model_type"}:
        if changed[name] is None:  # Qwen's layer_types allow only full attention
            continue
        assert from_config_json(base | {name: changed[name]}) != before, name


# --- weights -------------------------------------------------------------------------------------


def test_quantized_weights_are_refused_by_type(wide, tmp_path):
    folder = written(tmp_path, wide, "qwen3", QWEN)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} is F8_E4M3, quantized"):
        ours(folder, torch.zeros(1, 3, dtype=torch.long))


def test_a_tensor_under_two_names_is_refused(wide, tmp_path):
    folder = written(tmp_path, wide, "qwen3", QWEN)
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is also language_model\.model\.norm"):
        ours(folder, torch.zeros(1, 3, dtype=torch.long))


def test_a_tensor_in_two_shards_is_refused(wide, tmp_path):
    folder = written(tmp_path, wide, "qwen3", QWEN, shards="20KB")
    path = sorted(folder.glob("*.safetensors"))[1]
    stale = load_file(path) | {"model.norm.weight": torch.full((32,), 9.0)}
    save_file(stale, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight is also model\.norm\.weight in"
    ):
        ours(folder, torch.zeros(1, 3, dtype=torch.long))


def test_a_single_file_precedes_an_index_as_in_transformers(wide, tokens, tmp_path, relative_error):
    folder = written(tmp_path, wide, "qwen3", QWEN, shards="20KB")
    other = written(tmp_path / "other", wide, "qwen3", QWEN)
    tensors = load_file(other / "model.safetensors")
    tensors = {name: value * 1.1 for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert relative_error(ours(folder, tokens), theirs(folder, tokens)) < 2e-5
