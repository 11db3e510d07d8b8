"""config.json of both families, read and written.

Reads files of transformers 4 and 5 and of the hub, including the text part of multimodal Gemma
folders. A field that would change the computation in an unsupported way is refused by name, never
ignored.

Writes both spellings where transformers 4 and 5 differ (RoPE, dtype, layer pattern, experts), so
that either opens the folder with the same numbers.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pretrain_cli.errors import CheckpointError, ConfigError
from pretrain_cli.model.config import FULL, SLIDING, ModelConfig, checked
from pretrain_cli.model.formats.hf_fields import check_fields, read_rope

NUMBERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip


def to_config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return config.json of a model with weights in `dtype`, for transformers 4 and 5."""
    out: dict[str, Any] = {
        "architectures": [FAMILIES[config.model_type].architecture],
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
    out |= FAMILIES[config.model_type].own_fields(config)
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
    """Return RoPE's linear scaling; None if positions are not scaled."""
    factor = config.rope_scaling_factor
    return {"factor": factor, "rope_type": "linear"} if factor != 1.0 else None


def _gemma3_json(config: ModelConfig) -> dict[str, Any]:
    linear = _linear(config)
    base = {"rope_theta": config.rope_theta}
    full = [i for i, kind in enumerate(config.layer_types) if kind == FULL]
    scalar = config.query_pre_attn_scalar
    return {
        "hidden_activation": config.hidden_activation,
        # transformers 5 requires an int if the number is whole
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


def _qwen3_json(config: ModelConfig) -> dict[str, Any]:
    linear = _linear(config)
    return {
        "hidden_act": config.hidden_activation,
        "rope_scaling": linear,
        "rope_parameters": {
            **(linear or {"rope_type": "default"}),
            "rope_theta": config.rope_theta,
        },
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
    }


def from_config_json(raw: dict[str, Any]) -> ModelConfig:
    """Return the ModelConfig of a config.json. Raises ConfigError if this decoder cannot compute
    it."""
    if raw.get("model_type") == "gemma3":
        raw = _text_config(raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type '{model_type}' is not one of {', '.join(FAMILIES)}"
        )
    check_fields(raw, model_type)
    raw = _without_nulls(raw, model_type)
    numbers = FAMILIES[model_type].numbers(raw)
    return ModelConfig(**{name: checked(name, value) for name, value in numbers.items()})


def _text_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the text part of a multimodal Gemma config."""
    check_fields(raw, "gemma3")
    text = {"model_type": "gemma3_text", **raw.get("text_config", {})}
    outer, inner = (config.get("tie_word_embeddings", True) for config in (raw, text))
    if outer != inner:
        raise ConfigError(
            f"config.json: tie_word_embeddings is {outer} beside text_config and {inner} within "
            "(true where it is not given); make them the same"
        )
    return text


def _without_nulls(raw: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Drop null fields, except those for which null has a meaning. A required number that is null
    raises ConfigError; no default replaces it."""
    given = {
        k: v for k, v in raw.items() if v is not None or k in ("pad_token_id", "sliding_window")
    }
    for name in NUMBERS:
        if name not in raw or raw[name] is not None:
            continue
        meaning = FAMILIES[model_type].null_means.get(name)
        if meaning is not None:
            given |= meaning(raw)
        else:
            raise ConfigError(f"config.json: {name} is null; give the model's")
    return given


def _common(raw: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that both families spell alike; absent ones get transformers' class
    defaults."""
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


def _gemma3_numbers(raw: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
        "tie_word_embeddings": True, "pad_token_id": 0,
    }  # fmt: skip
    depth = raw.get("num_hidden_layers", 26)
    # transformers ignores `_sliding_window_pattern` without layer_types, and so does this.
    pattern = raw.get("sliding_window_pattern", 6)
    kinds = raw.get("layer_types") or [
        FULL if (i + 1) % pattern == 0 else SLIDING for i in range(depth)
    ]
    _refuse_other_depth(kinds, depth)
    if not {FULL, SLIDING} & (raw.get("rope_parameters") or {FULL: {}}).keys():
        # transformers would ignore them silently
        raise ConfigError(
            f"config.json: rope_parameters of a Gemma 3 must say {FULL} and {SLIDING}"
        )
    theta, factor = read_rope(raw, FULL, "rope_theta", 1_000_000.0)
    local_theta, local_factor = read_rope(raw, SLIDING, "rope_local_base_freq", 10_000.0)
    if local_factor != 1.0:
        raise ConfigError("config.json: linear RoPE scaling of sliding layers is not computed here")
    return dict(
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


def _qwen3_numbers(raw: dict[str, Any]) -> dict[str, Any]:
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
    _refuse_other_depth(raw.get("layer_types"), raw["num_hidden_layers"])
    counts = {raw[name] for name in ("num_experts", "num_local_experts") if name in raw}
    if len(counts) > 1:
        raise ConfigError("config.json: num_experts and num_local_experts differ; keep one")
    theta, factor = read_rope(raw, FULL, "rope_theta", 10_000.0)
    common = _common(raw, defaults)
    return dict(
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
        num_experts=next(iter(counts), 128) if is_moe else 0,
        num_experts_per_tok=raw.get("num_experts_per_tok", 8) if is_moe else 0,
        moe_intermediate_size=raw.get("moe_intermediate_size", 768) if is_moe else 0,
        norm_topk_prob=raw.get("norm_topk_prob", False),
        router_aux_loss_coef=float(raw.get("router_aux_loss_coef", 0.001)) if is_moe else 0.0,
        decoder_sparse_step=raw.get("decoder_sparse_step", 1),
        mlp_only_layers=tuple(raw.get("mlp_only_layers", ())),
    )


def _as_many_as_heads(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the number of key and value heads that transformers takes for null."""
    return {"num_key_value_heads": raw.get("num_attention_heads")}


def _head_dim_by_width(raw: dict[str, Any]) -> dict[str, Any]:
    """Return nothing: an absent head_dim follows from the width."""
    return {}


class HuggingFace(NamedTuple):
    """A family as config.json has it."""

    architecture: str
    """Class in transformers."""
    own_fields: Callable[[ModelConfig], dict[str, Any]]
    """config -> the fields that the families write differently."""
    numbers: Callable[[dict[str, Any]], dict[str, Any]]
    """config.json -> the fields of ModelConfig."""
    null_means: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]
    """Numbers that may be null, and what transformers then takes."""


FAMILIES = {
    "gemma3_text": HuggingFace("Gemma3ForCausalLM", _gemma3_json, _gemma3_numbers, {}),
    "qwen3": HuggingFace(
        "Qwen3ForCausalLM",
        _qwen3_json,
        _qwen3_numbers,
        {"num_key_value_heads": _as_many_as_heads},
    ),
    "qwen3_moe": HuggingFace(
        "Qwen3MoeForCausalLM",
        _qwen3_json,
        _qwen3_numbers,
        {"num_key_value_heads": _as_many_as_heads, "head_dim": _head_dim_by_width},
    ),
}


def _refuse_other_depth(kinds: list[str] | None, depth: int) -> None:
    if kinds is not None and len(kinds) != depth:
        raise ConfigError(f"config.json: {len(kinds)} layer_types for {depth} num_hidden_layers")


def read_config(folder: Path) -> ModelConfig:
    """Return the ModelConfig of a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json; give a Hugging Face model folder")
    try:
        return from_config_json(json.loads(path.read_text()))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a model's config.json ({error}); mend it") from None
