"""GGUF: llama.cpp's names and keys, and errors for models that it cannot compute."""

import pytest

from pretrain_cli.errors import ConfigError
from pretrain_cli.model.config import FULL, SLIDING
from pretrain_cli.model.formats.gguf import gguf_metadata, gguf_tensors
from pretrain_cli.model.parameter_map import Merged
from pretrain_cli.model.presets import PUBLISHED, preset

S, F = SLIDING, FULL


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size_has_the_gguf_packages_tensor_names(name):
    gguf = pytest.importorskip("gguf")
    config = preset(name)
    family = next(iter(gguf_metadata(config))).split(".")[0]
    [architecture] = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for tensor in gguf_tensors(config, Merged()):
        published = tensor.pieces[0].name
        if tensor.is_stacked:
            published = published.replace(".experts.0.", ".experts.")
        assert names.get_name(published, (".weight",)) == tensor.name


def test_gguf_metadata_of_gemma3_27b_is_as_published():
    assert gguf_metadata(preset("gemma3-27b")) == {
        "gemma3.context_length": 131_072,
        "gemma3.embedding_length": 5376,
        "gemma3.block_count": 62,
        "gemma3.feed_forward_length": 21_504,
        "gemma3.attention.head_count": 32,
        "gemma3.attention.head_count_kv": 16,
        "gemma3.attention.key_length": 128,
        "gemma3.attention.value_length": 128,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.attention.sliding_window": 1024,
        "gemma3.attention.sliding_window_pattern": 6,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 1e4,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }


def test_gguf_metadata_of_a_mixture_of_experts_is_as_published():
    facts = gguf_metadata(preset("qwen3-30b-a3b"))
    assert facts["qwen3moe.expert_count"] == 128
    assert facts["qwen3moe.expert_used_count"] == 8
    assert facts["qwen3moe.expert_feed_forward_length"] == 768
    assert facts["qwen3moe.rope.freq_base"] == 1e6
    assert not [key for key in facts if "sliding" in key or "scaling" in key or "swa" in key]


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        ((S, S, F, S, S, F, S), 3),
        ((S, F), 2),
        ((S, S), 3),  # no full layer: it would be the third
        ((F, S, S), [False, True, True]),
        ((S, F, F), [True, False, False]),
    ],
)
def test_the_window_pattern_is_a_period_or_a_list_of_layers(make_config, kinds, pattern):
    config = make_config(layer_types=kinds, query_pre_attn_scalar=16)
    assert gguf_metadata(config)["gemma3.attention.sliding_window_pattern"] == pattern


def test_a_gemma_without_sliding_layers_has_no_window(make_config):
    facts = gguf_metadata(make_config(layer_types=(F, F), query_pre_attn_scalar=16))
    assert not [key for key in facts if "sliding" in key or "swa" in key]


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma3", {}, "query_pre_attn_scalar is 20, and llama.cpp computes gemma3 with 16"),
        ("gemma3", {"layer_types": (S,) * 62, "query_pre_attn_scalar": 16},
         "query_pre_attn_scalar is 16, and llama.cpp computes gemma3 with 8"),
        ("gemma3", {"query_pre_attn_scalar": 16, "hidden_activation": "silu"},
         "hidden_activation is silu, and llama.cpp computes gemma3 with gelu_pytorch_tanh"),
        ("qwen3", {"hidden_activation": "gelu_pytorch_tanh"}, "qwen3 with silu"),
        ("moe", {"norm_topk_prob": False, "mlp_only_layers": ()}, "norm_topk_prob is False"),
        ("moe", {}, "1 of 3 layers have no experts"),
        ("moe", {"decoder_sparse_step": 2, "mlp_only_layers": ()}, "2 of 3 layers have no experts"),
    ],
)  # fmt: skip
def test_fields_that_llama_cpp_computes_differently_are_refused(make_config, family, changes, said):
    with pytest.raises(ConfigError, match=said):
        gguf_metadata(make_config(family, **changes))
