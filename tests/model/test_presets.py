"""Every published size against the numbers of its published config.json, written out here."""

import pytest

from pretrain_cli.errors import ConfigError
from pretrain_cli.model.config import FULL, SLIDING, ModelConfig
from pretrain_cli.model.formats.hf_config import from_config_json
from pretrain_cli.model.presets import ALIASES, PRESETS, PUBLISHED, SMALL, full_name, preset

# name: hidden, intermediate, layers, heads, key/value heads, head_dim, attention scalar, window,
#       vocabulary, positions, RoPE factor, full layers (counted from 0)
GEMMA = {
    "gemma3-270m": (640, 2048, 18, 4, 1, 256, 256, 512, 262144, 32768, 1.0, [5, 11, 17]),
    "gemma3-1b": (1152, 6912, 26, 4, 1, 256, 256, 512, 262144, 32768, 1.0, [5, 11, 17, 23]),
    "gemma3-4b": (
        *(2560, 10240, 34, 8, 4, 256, 256, 1024, 262208, 131072, 8.0),
        [5, 11, 17, 23, 29],
    ),
    "gemma3-12b": (
        *(3840, 15360, 48, 16, 8, 256, 256, 1024, 262208, 131072, 8.0),
        [5, 11, 17, 23, 29, 35, 41, 47],
    ),
    "gemma3-27b": (
        *(5376, 21504, 62, 32, 16, 128, 168, 1024, 262208, 131072, 8.0),
        [5, 11, 17, 23, 29, 35, 41, 47, 53, 59],
    ),
}
# name: hidden, intermediate, layers, heads, key/value heads, tied, (experts, chosen, their width)
QWEN = {
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, True, None),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, True, None),
    "qwen3-4b": (2560, 9728, 36, 32, 8, True, None),
    "qwen3-8b": (4096, 12288, 36, 32, 8, False, None),
    "qwen3-14b": (5120, 17408, 40, 40, 8, False, None),
    "qwen3-32b": (5120, 25600, 64, 64, 8, False, None),
    "qwen3-30b-a3b": (2048, 6144, 48, 32, 4, False, (128, 8, 768)),
    "qwen3-235b-a22b": (4096, 12288, 94, 64, 4, False, (128, 8, 1536)),
}


def test_every_published_size_has_its_numbers_here():
    assert set(PUBLISHED) == set(GEMMA) | set(QWEN)


@pytest.mark.parametrize("name", GEMMA)
def test_gemma_sizes_are_as_published(name):
    hidden, wide, layers, heads, kv, dim, scalar, window, vocab, positions, factor, full = GEMMA[
        name
    ]
    assert preset(name) == ModelConfig(
        model_type="gemma3_text",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=wide,
        layer_types=tuple(FULL if i in full else SLIDING for i in range(layers)),
        sliding_window=window,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=dim,
        query_pre_attn_scalar=scalar,
        max_position_embeddings=positions,
        rope_theta=1_000_000.0,
        rope_local_base_freq=10_000.0,
        rope_scaling_factor=factor,
        rms_norm_eps=0.000001,
        norm_is_zero_centered=True,
        has_post_norms=True,
        hidden_activation="gelu_pytorch_tanh",
        embedding_is_scaled=True,
        tie_word_embeddings=True,
        initializer_range=0.02,
        pad_token_id=0,
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        norm_topk_prob=False,
        router_aux_loss_coef=0.0,
        decoder_sparse_step=1,
        mlp_only_layers=(),
    )


@pytest.mark.parametrize("name", QWEN)
def test_qwen_sizes_are_as_published(name):
    hidden, wide, layers, heads, kv, tied, moe = QWEN[name]
    experts, chosen, width = moe or (0, 0, 0)
    assert preset(name) == ModelConfig(
        model_type="qwen3_moe" if moe else "qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=wide,
        layer_types=(FULL,) * layers,
        sliding_window=None,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=128,
        query_pre_attn_scalar=128,
        max_position_embeddings=40960,
        rope_theta=1_000_000.0,
        rope_local_base_freq=None,
        rope_scaling_factor=1.0,
        rms_norm_eps=0.000001,
        norm_is_zero_centered=False,
        has_post_norms=False,
        hidden_activation="silu",
        embedding_is_scaled=False,
        tie_word_embeddings=tied,
        initializer_range=0.02,
        pad_token_id=None,
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=width,
        norm_topk_prob=moe is not None,
        router_aux_loss_coef=0.001 if moe else 0.0,
        decoder_sparse_step=1,
        mlp_only_layers=(),
    )


# Fields of the hub's config.json files that affect the computation.
GEMMA_FILE = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "bos_token_id": 2,
    "pad_token_id": 0,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}
QWEN_FILE = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
S, F = ["sliding_attention"], ["full_attention"]
FILES = {
    "gemma3-270m": GEMMA_FILE
    | {
        "_sliding_window_pattern": 6,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "layer_types": (5 * S + F) * 3,
        "num_hidden_layers": 18,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
        "use_bidirectional_attention": False,
    },
    "gemma3-1b": GEMMA_FILE
    | {
        "cache_implementation": "hybrid",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "sliding_window_pattern": 6,
    },
    # From 4B up the text config is nested; fields it omits have transformers' defaults.
    "gemma3-4b": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "gemma3-12b": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "gemma3-27b": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
} | {
    name: QWEN_FILE
    | {
        "model_type": "qwen3_moe" if moe else "qwen3",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "tie_word_embeddings": tied,
    }
    | (
        {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": moe[2],
            "norm_topk_prob": True,
            "num_experts": moe[0],
            "num_experts_per_tok": moe[1],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
        if moe
        else {}
    )
    for name, (hidden, wide, layers, heads, kv, tied, moe) in QWEN.items()
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_config_json_is_read_as_the_preset(name):
    file = FILES[name]
    if name in ("gemma3-4b", "gemma3-12b", "gemma3-27b"):
        file = {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "initializer_range": 0.02,
            "mm_tokens_per_image": 256,
            "text_config": file,
            "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
        }
    assert from_config_json(file) == preset(name)


def test_a_family_name_means_its_smallest_published_size():
    assert preset("gemma3") == preset("gemma3-270m")
    assert preset("qwen3") == preset("qwen3-0.6b")
    assert full_name("gemma3") == "gemma3-270m"


def test_the_small_sizes_are_not_among_the_published_ones():
    assert set(SMALL) == {"gemma3-tiny", "gemma3-small", "qwen3-tiny", "qwen3-small"}
    assert not set(SMALL) & set(PUBLISHED)
    assert set(PRESETS) == set(SMALL) | set(PUBLISHED)


def test_the_small_gemma_has_both_kinds_of_layers():
    assert set(preset("gemma3-tiny").layer_types) == {FULL, SLIDING}


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"file; did you mean gemma3-270m\? Known: ") as error:
        preset("gemma3-27m")
    for name in [*ALIASES, *PRESETS]:
        assert name in str(error.value)
