"""Model folders: transformers opens ours with the same logits, and we open its folders and the
hub's. Models that this decoder cannot compute are refused by name."""

import importlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pretrain_cli.errors import CheckpointError
from pretrain_cli.model.config import FULL, SLIDING, variant
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.hf_config import read_config, to_config_json
from pretrain_cli.model.formats.hf_weights import (
    load_weights,
    published_tensors,
    weight_files,
    write_weights,
)
from pretrain_cli.model.parameter_map import Merged
from pretrain_cli.model.presets import preset

LINEAR = {"rope_type": "linear", "factor": 8.0}


def write_folder(model, folder, dtype=torch.float32):
    """Write a model folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(to_config_json(model.config, str(dtype).removeprefix("torch.")))
    )
    tensors = published_tensors(model, lambda parameter: parameter)
    write_weights(folder, {name: value.to(dtype) for name, value in tensors.items()})
    return folder


def opened_by_transformers(folder):
    """Return transformers' float32 model, and missing, unexpected and mismatched names."""
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
    """Return the folder of a tied Gemma 3 that a test may damage."""
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
def test_transformers_opens_our_folders_with_the_same_logits(
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
def test_a_written_folder_is_read_back_with_equal_weights(make_config, wide, tmp_path, case):
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
    """With stacked experts, one copy per part would copy the whole parameter hundreds of times."""
    model, asked = Decoder(make_config("moe")), []

    def copied(parameter):
        asked.append(parameter)
        return parameter.clone()

    tensors = published_tensors(model, copied)
    assert len(asked) == len(list(model.parameters())) < len(tensors)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert len(storages) == len(asked)


def test_weight_names_equal_those_that_transformers_writes(reference, tmp_path):
    ours, left_out = opened_by_us(reference.folder)
    assert left_out == []
    assert names_in(write_folder(ours, tmp_path)) == names_in(reference.folder)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


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
    """transformers nests text_config, and writes language_model.model.* beside the vision tower."""
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


# --- refusals ------------------------------------------------------------------------------------


def test_folders_without_config_or_weights_are_refused_by_name(folder):
    (folder / "config.json").rename(folder / "config.old")
    with pytest.raises(CheckpointError, match=r"model: no config\.json"):
        read_config(folder)
    (folder / "config.old").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model: no model\.safetensors"):
        opened_by_us(folder)


@pytest.mark.parametrize("content", [b'{"model_type": "qw', b"\xff\xfe\x00", b"[1]"])
def test_an_invalid_config_json_is_refused_by_name(folder, content):
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
def test_a_config_that_does_not_fit_the_weights_is_refused(folder, field, value, tensor):
    edit_config(folder, **{field: value})
    with pytest.raises(CheckpointError, match=tensor):
        opened_by_us(folder)


@pytest.mark.parametrize("tied_head", [False, True], ids=["", "with a head"])
@pytest.mark.parametrize("name", ["model.layers.2.self_attn.k_norm.weight", "model.norm.weight",
                                  "model.embed_tokens.weight"])  # fmt: skip
def test_a_missing_tensor_is_named(folder, name, tied_head):
    tensors = load_file(folder / "model.safetensors")
    if tied_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 tensors .* missing, {name} the first"):
        opened_by_us(folder)


def test_weights_with_too_few_layers_are_refused_by_name(folder):
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


def test_a_tied_model_with_a_different_head_is_refused(folder):
    """transformers 5 would use the file's head, transformers 4 the embedding."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        opened_by_us(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -1], ids=lambda n: f"{n} bytes")
def test_a_truncated_weight_file_is_refused_by_name(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut short or damaged"):
        opened_by_us(folder)


@pytest.fixture
def sharded(make_transformers_model, tmp_path):
    folder = tmp_path / "sharded"
    make_transformers_model("qwen3-tied").save_pretrained(folder, max_shard_size="40KB")
    return folder


def test_a_missing_shard_is_refused_by_name(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"{gone.name}: named by the index, but not there"):
        opened_by_us(sharded)


@pytest.mark.parametrize("content", ['{"weight_map": {"model', "{}"], ids=["cut", "empty"])
def test_a_damaged_index_is_refused_by_name(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: damaged"):
        opened_by_us(sharded)


def test_a_moved_folder_can_be_opened(sharded, tokens, tmp_path):
    """Shards are looked up in the folder of their index."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(sharded, moved)
    shutil.rmtree(sharded)
    _, left_out = opened_by_us(moved)
    assert left_out == []


def test_config_json_of_a_variant_is_read_back_equal(tmp_path):
    config = variant(preset("gemma3-tiny"), {"num_hidden_layers": 3, "head_dim": 32})
    (tmp_path / "config.json").write_text(json.dumps(to_config_json(config, "float32")))
    assert read_config(tmp_path) == config
