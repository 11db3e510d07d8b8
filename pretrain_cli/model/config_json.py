"""config.json of either family, both ways.

Reading takes what transformers 4 and 5 write and what the hub holds, the text part of multimodal
Gemma folders too. A field that would change the mathematics in a way this decoder doesn't compute
is refused by name, never ignored.

Writing gives both spellings of what the two transformers versions call differently (RoPE, dtype,
layer pattern, experts), so that either opens the folder with the same numbers.
"""

import json
from pathlib import Path
from typing import Any

from pretrain_cli.errors import CheckpointError, ConfigError
from pretrain_cli.model.config import FULL, SLIDING, ModelConfig

ARCHITECTURES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def to_config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of this model with weights in `dtype`, in the words of transformers 4 and 5."""
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "layer_types": list(config.layer_types),
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.model_type == "gemma3_text":
        out |= _gemma3_json(config)
    else:
        out |= {
            "hidden_act": config.hidden_activation,
            "rope_scaling": _linear(config),
            "rope_parameters": {
                **(_linear(config) or {"rope_type": "default"}),
                "rope_theta": config.rope_theta,
            },
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": config.num_hidden_layers,
        }
    if config.num_experts:
        out |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "router_aux_loss_coef": config.router_aux_loss_coef,
            "output_router_logits": False,
            "decoder_sparse_step": config.decoder_sparse_step,
            "mlp_only_layers": list(config.mlp_only_layers),
        }
    return out


def _linear(config: ModelConfig) -> dict[str, Any] | None:
    """RoPE's linear scaling, or None where positions stay as they are."""
    factor = config.rope_scaling_factor
    return {"factor": factor, "rope_type": "linear"} if factor != 1.0 else None


def _gemma3_json(config: ModelConfig) -> dict[str, Any]:
    linear = _linear(config)
    base = {"rope_theta": config.rope_theta}
    full = [i for i, kind in enumerate(config.layer_types) if kind == FULL]
    scalar = config.query_pre_attn_scalar
    return {
        "hidden_activation": config.hidden_activation,
        # transformers 5 insists on a whole number where the number is whole
        "query_pre_attn_scalar": int(scalar) if float(scalar).is_integer() else scalar,
        "sliding_window": config.sliding_window,
        "sliding_window_pattern": full[0] + 1 if full else config.num_hidden_layers + 1,
        "rope_local_base_freq": config.rope_local_base_freq,
        "rope_scaling": linear,
        "rope_parameters": {
            FULL: {**(linear or {"rope_type": "default"}), **base},
            SLIDING: {"rope_type": "default", "rope_theta": config.rope_local_base_freq},
        },
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }


def from_config_json(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json; ConfigError for what this decoder doesn't compute."""
    if raw.get("model_type") == "gemma3":
        raw = {"model_type": "gemma3_text", **raw.get("text_config", {})}
    raw = {k: v for k, v in raw.items() if v is not None or k == "pad_token_id"}
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"config.json: model_type '{model_type}' is not one of {', '.join(ARCHITECTURES)}"
        )
    for name, plain in (
        ("attention_bias", False),
        ("attention_dropout", 0.0),
        ("attn_logit_softcapping", None),
        ("final_logit_softcapping", None),
        ("use_bidirectional_attention", False),
        ("use_sliding_window", False),
        ("shared_expert_intermediate_size", None),
    ):
        if raw.get(name, plain) != plain:
            raise ConfigError(
                f"config.json: {name} is {raw[name]}, which this decoder does not compute"
            )
    return _gemma3_config(raw) if model_type == "gemma3_text" else _qwen3_config(raw)


def _common(raw: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields that both families spell alike; absent ones are transformers' class defaults."""
    get = {**defaults, **raw}.__getitem__
    try:
        return {
            "model_type": get("model_type"),
            "vocab_size": get("vocab_size"),
            "hidden_size": get("hidden_size"),
            "intermediate_size": get("intermediate_size"),
            "num_attention_heads": get("num_attention_heads"),
            "num_key_value_heads": get("num_key_value_heads"),
            "head_dim": get("head_dim"),
            "max_position_embeddings": get("max_position_embeddings"),
            "rms_norm_eps": float(get("rms_norm_eps")),
            "initializer_range": float(get("initializer_range")),
            "tie_word_embeddings": get("tie_word_embeddings"),
            "pad_token_id": get("pad_token_id"),
        }
    except KeyError as missing:
        raise ConfigError(f"config.json: {missing} is missing") from None


def _rope(raw: dict[str, Any], kind: str, spelled: str, default: float) -> tuple[float, float]:
    """(base, factor) of one kind of layer, from either spelling or both."""
    parameters = raw.get("rope_parameters", {})
    if FULL in parameters or SLIDING in parameters:
        parameters = parameters.get(kind, {})
    scaling = raw.get("rope_scaling", {}) if kind == FULL else {}
    parameters = {"rope_theta": raw.get(spelled, default), **scaling, **parameters}
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise ConfigError(
            f"config.json: RoPE scaling '{rope_type}' of {kind} layers, which this decoder "
            "does not compute (it computes default and linear)"
        )
    factor = parameters.get("factor", 1.0) if rope_type == "linear" else 1.0
    return float(parameters["rope_theta"]), float(factor)


def _gemma3_config(raw: dict[str, Any]) -> ModelConfig:
    defaults = {
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
        "tie_word_embeddings": True, "pad_token_id": 0,
    }  # fmt: skip
    depth = raw.get("num_hidden_layers", 26)
    # `_sliding_window_pattern` without layer_types is ignored by transformers, and so here.
    pattern = raw.get("sliding_window_pattern", 6)
    kinds = raw.get("layer_types") or [
        FULL if (i + 1) % pattern == 0 else SLIDING for i in range(depth)
    ]
    if len(kinds) != depth:
        raise ConfigError(f"config.json: {len(kinds)} layer_types for {depth} num_hidden_layers")
    if not {FULL, SLIDING} & (raw.get("rope_parameters") or {FULL: {}}).keys():
        # transformers would ignore them without a word
        raise ConfigError(
            f"config.json: rope_parameters of a Gemma 3 must say {FULL} and {SLIDING}"
        )
    theta, factor = _rope(raw, FULL, "rope_theta", 1_000_000.0)
    local_theta, local_factor = _rope(raw, SLIDING, "rope_local_base_freq", 10_000.0)
    if local_factor != 1.0:
        raise ConfigError("config.json: linear RoPE scaling of sliding layers is not computed here")
    return ModelConfig(
        **_common(raw, defaults),
        layer_types=tuple(kinds),
        sliding_window=raw.get("sliding_window", 4096),
        query_pre_attn_scalar=raw.get("query_pre_attn_scalar", 256),
        rope_theta=theta,
        rope_local_base_freq=local_theta,
        rope_scaling_factor=factor,
        norm_is_zero_centered=True,
        has_post_norms=True,
        hidden_activation=raw.get("hidden_activation", "gelu_pytorch_tanh"),
        embedding_is_scaled=True,
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        norm_topk_prob=False,
        router_aux_loss_coef=0.0,
        decoder_sparse_step=1,
        mlp_only_layers=(),
    )


def _qwen3_config(raw: dict[str, Any]) -> ModelConfig:
    is_moe = raw["model_type"] == "qwen3_moe"
    head_dim = 128
    if is_moe and "hidden_size" in raw and "num_attention_heads" in raw:
        head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    defaults = {
        "num_key_value_heads": 4 if is_moe else 32, "head_dim": head_dim,
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
        "tie_word_embeddings": False, "pad_token_id": None,
    }  # fmt: skip
    if "num_hidden_layers" not in raw:
        raise ConfigError("config.json: 'num_hidden_layers' is missing")
    if SLIDING in raw.get("layer_types", []):
        raise ConfigError("config.json: sliding_attention layers in a Qwen 3 are not computed here")
    theta, factor = _rope(raw, FULL, "rope_theta", 10_000.0)
    common = _common(raw, defaults)
    return ModelConfig(
        **common,
        layer_types=(FULL,) * raw["num_hidden_layers"],
        sliding_window=None,
        query_pre_attn_scalar=common["head_dim"],
        rope_theta=theta,
        rope_local_base_freq=None,
        rope_scaling_factor=factor,
        norm_is_zero_centered=False,
        has_post_norms=False,
        hidden_activation=raw.get("hidden_act", "silu"),
        embedding_is_scaled=False,
        num_experts=raw.get("num_experts", raw.get("num_local_experts", 128)) if is_moe else 0,
        num_experts_per_tok=raw.get("num_experts_per_tok", 8) if is_moe else 0,
        moe_intermediate_size=raw.get("moe_intermediate_size", 768) if is_moe else 0,
        norm_topk_prob=raw.get("norm_topk_prob", False),
        router_aux_loss_coef=float(raw.get("router_aux_loss_coef", 0.001)) if is_moe else 0.0,
        decoder_sparse_step=raw.get("decoder_sparse_step", 1),
        mlp_only_layers=tuple(raw.get("mlp_only_layers", ())),
    )


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json; give a Hugging Face model folder")
    try:
        return from_config_json(json.loads(path.read_text()))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a model's config.json ({error}); mend it") from None
