"""Model folders, both ways: transformers opens ours with the same logits, we open its and the
hub's; and what this decoder would not compute as asked is refused by name."""

import importlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pretrain_cli.errors import CheckpointError, ConfigError, PretrainError
from pretrain_cli.model.config import FULL, SLIDING, variant
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.hf_config import from_config_json, read_config, to_config_json
from pretrain_cli.model.formats.hf_weights import (
    load_weights,
    published_tensors,
    weight_files,
    write_weights,
)
from pretrain_cli.model.parameter_map import Merged
from pretrain_cli.model.presets import PRESETS, preset

LINEAR = {"rope_type": "linear", "factor": 8.0}


def write_folder(model, folder, dtype=torch.float32):
    """A model folder of ours."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(to_config_json(model.config, str(dtype).removeprefix("torch.")))
    )
    tensors = published_tensors(model, lambda parameter: parameter)
    write_weights(folder, {name: value.to(dtype) for name, value in tensors.items()})
    return folder


def opened_by_transformers(folder):
    """The model, in float32 and eager; and the names that it missed or did not expect."""
    transformers = importlib.import_module("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]


def opened_by_us(folder):
    model = Decoder(read_config(folder))
    return model, load_weights(model, folder)


def names_in(folder):
    return sorted(name for names in weight_files(folder).values() for name in names)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def tokens():
    return torch.randint(0, 60, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(make_config, wide, tmp_path):
    """A Gemma 3 of ours, tied, written to disk; free to be damaged."""
    model = Decoder(make_config())
    wide(model)
    return write_folder(model, tmp_path / "model")


# --- ours, opened by transformers ----------------------------------------------------------------

OURS = {
    "gemma3": ("gemma3", {}),
    "gemma3 without scaling": ("gemma3", {"rope_scaling_factor": 1.0}),
    "gemma3 untied": ("gemma3", {"tie_word_embeddings": False}),
    "gemma3 in an order of its own": ("gemma3", {"layer_types": (FULL, SLIDING, FULL, SLIDING)}),
    "gemma3 without a padding token": ("gemma3", {"pad_token_id": None}),
    "gemma3 of whole scalar": ("gemma3", {"query_pre_attn_scalar": 24.0}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3 with scaling": ("qwen3", {"rope_scaling_factor": 4.0}),
    "moe": ("moe", {}),
    "moe unnormalized, every second": (
        "moe",
        {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": ()},
    ),
}


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "separate"])
@pytest.mark.parametrize("case", OURS.values(), ids=OURS)
def test_transformers_opens_what_is_written_with_the_same_logits(
    make_config, wide, tokens, tmp_path, relative_error, case, merged
):
    family, changes = case
    ours = Decoder(make_config(family, **changes), merged=Merged(merged, merged))
    wide(ours)
    theirs, complaints = opened_by_transformers(write_folder(ours, tmp_path))
    assert complaints == []
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(tokens).logits) < 2e-5


@pytest.mark.parametrize("case", OURS.values(), ids=OURS)
def test_a_folder_of_ours_is_read_back_as_it_was(make_config, wide, tmp_path, case):
    family, changes = case
    ours = Decoder(make_config(family, **changes), merged=Merged(True, True))
    wide(ours)
    write_folder(ours, tmp_path)
    again = Decoder(read_config(tmp_path), merged=Merged(False, False))
    assert again.config == ours.config
    assert load_weights(again, tmp_path) == []
    before, after = (published_tensors(m, lambda p: p) for m in (ours, again))
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert torch.equal(values, after[name]), name


def test_each_parameter_is_read_once_and_its_parts_share_its_memory(make_config):
    """For stacked experts, a value per part would be hundreds of copies of them all."""
    model, asked = Decoder(make_config("moe")), []

    def copied(parameter):
        asked.append(parameter)
        return parameter.clone()

    tensors = published_tensors(model, copied)
    assert len(asked) == len(list(model.parameters())) < len(tensors)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert len(storages) == len(asked)


def test_weight_names_are_those_that_transformers_writes(reference, tmp_path):
    ours, left_out = opened_by_us(reference.folder)
    assert left_out == []
    assert names_in(write_folder(ours, tmp_path)) == names_in(reference.folder)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_config_json(name):
    written = json.loads(json.dumps(to_config_json(preset(name), "bfloat16")))
    assert from_config_json(written) == preset(name)
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_from_config_json_what_the_preset_says(name, tmp_path):
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


# --- transformers' own and the hub's, opened by us -----------------------------------------------


def test_sharded_bfloat16_folders_load_as_transformers_loads_them(
    make_transformers_model, tokens, tmp_path, relative_error
):
    theirs = make_transformers_model("moe-normalized")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(weight_files(tmp_path)) > 3
    again, complaints = opened_by_transformers(tmp_path)
    assert complaints == []
    ours, left_out = opened_by_us(tmp_path)
    assert left_out == []
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    with torch.no_grad():
        assert relative_error(ours(tokens), again(tokens).logits) < 2e-5


def test_a_bfloat16_gemma_keeps_an_unrounded_scale_in_float32(
    make_transformers_model, tokens, tmp_path, relative_error
):
    make_transformers_model("gemma3").to(torch.bfloat16).save_pretrained(tmp_path)
    theirs, _ = opened_by_transformers(tmp_path)
    ours, _ = opened_by_us(tmp_path)
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(tokens).logits) < 2e-5


def test_the_text_part_of_a_multimodal_gemma_is_read(wide, tokens, tmp_path, relative_error):
    """As transformers writes it: text_config within, language_model.model.* beside the tower."""
    transformers = importlib.import_module("transformers")
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "query_pre_attn_scalar": 20, "sliding_window": 7, "rope_scaling": LINEAR,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28,
        "num_attention_heads": 2, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    wide(theirs)
    theirs.save_pretrained(tmp_path)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in names_in(tmp_path)

    ours, left_out = opened_by_us(tmp_path)
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(input_ids=tokens).logits) < 2e-5
    towers = [name for name in names_in(tmp_path) if not name.startswith("language_model.")]
    assert any(name.startswith("vision_tower.") for name in towers)
    assert left_out == towers


RENAMED = {
    "on the hub, from 4B up": lambda name: "language_model." + name,
    "in memory, transformers 4.52": lambda name: name.replace("model.", "model.language_model.", 1),
    "of the bare text model": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_weights_are_found_under_every_prefix_in_use(folder, tokens, rename):
    before, _ = opened_by_us(folder)
    tensors = {rename(k): v for k, v in load_file(folder / "model.safetensors").items()}
    extra = {
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(2),
        "multi_modal_projector.mm_soft_emb_norm.weight": torch.ones(2),
    }
    save_file(tensors | extra, folder / "model.safetensors")
    after, left_out = opened_by_us(folder)
    assert left_out == sorted(extra)
    with torch.no_grad():
        assert torch.equal(before(tokens), after(tokens))


def test_a_tied_folder_may_repeat_its_head(folder, tokens):
    before, _ = opened_by_us(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    after, left_out = opened_by_us(folder)
    assert left_out == []
    with torch.no_grad():
        assert torch.equal(before(tokens), after(tokens))


# --- both spellings of config.json ---------------------------------------------------------------

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


def test_layer_types_come_from_the_pattern_where_they_are_not_given():
    written = to_config_json(preset("gemma3-1b"), "float32")
    del written["layer_types"]
    assert from_config_json(written) == preset("gemma3-1b")
    written["sliding_window_pattern"] = 3
    expected = tuple(FULL if i % 3 == 2 else SLIDING for i in range(26))
    assert from_config_json(written).layer_types == expected


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "qwen3-30b-a3b"])
def test_a_field_that_is_null_is_a_field_that_is_absent(name):
    """In nested configs too: transformers writes null for much that it leaves alone."""
    written = to_config_json(preset(name), "float32")
    for optional in ("rope_parameters", "use_bidirectional_attention", "attention_bias",
                     "sliding_window_pattern", "use_sliding_window"):  # fmt: skip
        written[optional] = None
    assert from_config_json(written) == preset(name)
    if name == "gemma3":
        assert from_config_json({"model_type": "gemma3", "text_config": written}) == preset(name)


def test_a_null_padding_token_is_none_though_gemma_has_one_by_default():
    written = to_config_json(preset("gemma3"), "float32")
    assert from_config_json(written | {"pad_token_id": None}).pad_token_id is None
    del written["pad_token_id"]
    assert from_config_json(written).pad_token_id == 0


# --- refusals ------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_would_change_the_mathematics_is_refused_by_name(case, tmp_path):
    name, changes, message = case
    written = to_config_json(preset(name), "float32") | changes
    with pytest.raises(ConfigError) as error:
        from_config_json(written)
    assert message in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError) as error:  # the same words, and the folder's name
        read_config(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_multimodal_config_is_refused_for_what_its_text_part_says():
    text = to_config_json(preset("gemma3-4b"), "float32") | {"final_logit_softcapping": 30.0}
    with pytest.raises(ConfigError, match="final_logit_softcapping is 30"):
        from_config_json({"model_type": "gemma3", "text_config": text})


@pytest.mark.parametrize(
    "field", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"]
)
def test_a_size_that_is_missing_is_named(field):
    written = to_config_json(preset("qwen3"), "float32")
    del written[field]
    with pytest.raises(PretrainError, match=f"'{field}' is missing"):
        from_config_json(written)


def test_folders_without_config_or_weights_are_refused_by_name(folder):
    (folder / "config.json").rename(folder / "config.old")
    with pytest.raises(CheckpointError, match=r"model: no config\.json"):
        read_config(folder)
    (folder / "config.old").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model: no model\.safetensors"):
        opened_by_us(folder)


@pytest.mark.parametrize("content", [b'{"model_type": "qw', b"\xff\xfe\x00", b"[1]"])
def test_a_config_that_is_no_models_is_refused_by_name(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: not a model's"):
        read_config(folder)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(40, 32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        opened_by_us(folder)
    message = str(error.value)
    assert "model.layers.1.mlp.up_proj.weight is (40, 32)" in message
    assert "(48, 32)" in message


@pytest.mark.parametrize(
    ("field", "value", "tensor"),
    [
        ("vocab_size", 61, "model.embed_tokens.weight"),
        ("head_dim", 8, "self_attn.q_proj.weight"),
        ("intermediate_size", 40, "mlp.gate_proj.weight"),
    ],
)
def test_a_config_that_is_not_of_these_weights_is_refused(folder, field, value, tensor):
    edit_config(folder, **{field: value})
    with pytest.raises(CheckpointError, match=tensor):
        opened_by_us(folder)


@pytest.mark.parametrize("tied_head", [False, True], ids=["", "with a head"])
@pytest.mark.parametrize("name", ["model.layers.2.self_attn.k_norm.weight", "model.norm.weight",
                                  "model.embed_tokens.weight"])  # fmt: skip
def test_a_tensor_that_is_missing_is_named(folder, name, tied_head):
    tensors = load_file(folder / "model.safetensors")
    if tied_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 tensors .* missing, {name} the first"):
        opened_by_us(folder)


def test_more_layers_than_the_weights_hold_are_missed_by_name(folder):
    edit_config(folder, num_hidden_layers=4, layer_types=[FULL] * 4)
    with pytest.raises(CheckpointError, match=r"13 tensors .* model\.layers\.3\.input_layernorm"):
        opened_by_us(folder)


def test_a_shallower_model_ignores_the_other_layers_weights_by_name(folder):
    edit_config(folder, num_hidden_layers=2, layer_types=[SLIDING] * 2)
    _, left_out = opened_by_us(folder)
    assert len(left_out) == 13
    assert all(name.startswith("model.layers.2.") for name in left_out)


def test_an_untied_model_without_a_head_is_refused(folder):
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        opened_by_us(folder)


def test_a_tied_model_with_a_head_of_its_own_is_refused(folder):
    """transformers 5 would use one head, and transformers 4 the other."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        opened_by_us(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -1], ids=lambda n: f"{n} bytes")
def test_a_weight_file_that_is_cut_short_is_refused_by_name(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut short or damaged"):
        opened_by_us(folder)


@pytest.fixture
def sharded(make_transformers_model, tmp_path):
    folder = tmp_path / "sharded"
    make_transformers_model("qwen3-tied").save_pretrained(folder, max_shard_size="40KB")
    return folder


def test_a_shard_that_is_not_there_is_refused_by_name(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"{gone.name}: named by the index, but not there"):
        opened_by_us(sharded)


@pytest.mark.parametrize("content", ['{"weight_map": {"model', "{}"], ids=["cut", "empty"])
def test_a_damaged_index_is_refused_by_name(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: damaged"):
        opened_by_us(sharded)


def test_a_copied_folder_is_the_same_model(sharded, tokens, tmp_path):
    """Shards are found beside their index, wherever that is."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(sharded, moved)
    shutil.rmtree(sharded)
    _, left_out = opened_by_us(moved)
    assert left_out == []


def test_a_variant_is_written_as_what_it_is(tmp_path):
    config = variant(preset("gemma3-tiny"), {"num_hidden_layers": 3, "head_dim": 32})
    (tmp_path / "config.json").write_text(json.dumps(to_config_json(config, "float32")))
    assert read_config(tmp_path) == config
