"""Fields of config.json in both families, and how each is treated.

    read        hf_config.py puts it into the ModelConfig
    plain       changes the computation, and this decoder supports one value; others are refused
    harmless    changes neither logits nor loss

A field in none of these groups is refused too: it might silently change what the model computes.
null counts as absent.
"""

from typing import Any

from pretrain_cli.errors import ConfigError
from pretrain_cli.model.config import FULL, SLIDING

_READ = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
    "rms_norm_eps", "initializer_range", "tie_word_embeddings", "pad_token_id", "layer_types",
    "rope_theta", "rope_scaling", "rope_parameters",
}  # fmt: skip
_EXPERTS = {
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
    "norm_topk_prob", "router_aux_loss_coef", "decoder_sparse_step", "mlp_only_layers",
}  # fmt: skip
READ: dict[str, set[str]] = {
    "gemma3_text": _READ
    | {
        "hidden_activation", "query_pre_attn_scalar", "sliding_window", "sliding_window_pattern",
        "rope_local_base_freq",
    },
    "qwen3": _READ | {"hidden_act"},
    "qwen3_moe": _READ | {"hidden_act"} | _EXPERTS,
    "gemma3": {"model_type", "text_config", "tie_word_embeddings"},
}  # fmt: skip
"""Fields read, by model_type; `gemma3` is the outer config of a multimodal folder."""

PLAIN: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "shared_expert_intermediate_size": None,
    "quantization_config": None,
    "auto_map": None,
    "mlp_bias": False,
    "use_mrope": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
"""The one supported value of each field."""

HARMLESS: dict[str, set[str]] = {
    "says who wrote the file, and in what type": {
        "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path",
        "tokenizer_class", "unsloth_fixed", "unsloth_version",
    },
    "ids around a text, which the tokenizer says": {
        "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "prefix",
        "forced_bos_token_id", "forced_eos_token_id",
    },
    "of generating, not of the model": {
        "use_cache", "cache_implementation", "bad_words_ids", "begin_suppress_tokens",
        "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "length_penalty", "max_length", "min_length",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
        "remove_invalid_values", "repetition_penalty", "suppress_tokens", "temperature", "top_k",
        "top_p", "typical_p",
    },
    "of what a call returns": {
        "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states",
        "output_scores", "output_router_logits",
    },
    "of other tasks and frameworks": {
        "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params",
        "tf_legacy_loss", "torchscript", "use_bfloat16", "cross_attention_hidden_size",
        "is_decoder", "tie_encoder_decoder",
    },
    "how it is computed, not what": {
        "chunk_size_feed_forward", "attn_implementation", "_attn_implementation",
        "_attn_implementation_autoset",
    },
    "without a meaning where use_sliding_window is false, which it has to be": {
        "max_window_layers",
    },
    "transformers reads it only where layer_types says the same": {"_sliding_window_pattern"},
}  # fmt: skip
"""Fields without effect, by reason."""

OF_ONE_KIND = {
    "qwen3": {"sliding_window"},
    "qwen3_moe": {"sliding_window"},
    "gemma3": {
        "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
        "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id", "initializer_range",
        "pad_token_id",
    },
}  # fmt: skip
"""Fields without effect in one model_type: a Qwen's unused window, and image settings."""

SHOWN = 60


def check_fields(raw: dict[str, Any], model_type: str) -> None:
    """Raise ConfigError for an unknown field, or a value that this decoder does not compute."""
    harmless = set().union(*HARMLESS.values(), OF_ONE_KIND.get(model_type, set()))
    for name, value in raw.items():
        if value is None or name in READ[model_type] or name in harmless:
            continue
        shown = str(value) if len(str(value)) <= SHOWN else f"{str(value)[:SHOWN]}…"
        if name not in PLAIN:
            raise ConfigError(
                f"config.json: {name} is {shown}, a field that this decoder doesn't know of a "
                f"{model_type}; if it has no part in what the model computes, take it out"
            )
        if value != PLAIN[name]:
            raise ConfigError(
                f"config.json: {name} is {shown}, which this decoder does not compute"
            )


ROPE_FIELDS = {
    "rope_type", "type", "rope_theta", "factor", "partial_rotary_factor",
    "original_max_position_embeddings",  # for YaRN and similar, refused by type
}  # fmt: skip


def read_rope(raw: dict[str, Any], kind: str, spelled: str, default: float) -> tuple[float, float]:
    """Return (base, factor) of one layer type, from either spelling or both.

    If the two spellings contradict each other, one version of transformers follows the first and
    another the second: raises ConfigError.
    """
    parameters = raw.get("rope_parameters", {})
    if FULL in parameters or SLIDING in parameters:
        parameters = parameters.get(kind) or {}
    scaling = raw.get("rope_scaling", {}) if kind == FULL else {}
    for fields in (scaling, parameters):
        rope_type = fields.get("rope_type", fields.get("type", "default"))
        if rope_type not in ("default", "linear"):
            raise ConfigError(
                f"config.json: RoPE scaling '{rope_type}' of {kind} layers, which this decoder "
                "does not compute (it computes default and linear)"
            )
        for name in sorted(fields.keys() - ROPE_FIELDS):
            raise ConfigError(f"config.json: RoPE's {name} of {kind} layers is not known here")
        if fields.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(
                f"config.json: partial_rotary_factor is {fields['partial_rotary_factor']}, which "
                "this decoder does not compute"
            )
    factors = [_factor(fields) for fields in (scaling, parameters) if fields]
    bases = [fields[name] for fields, name in
             ((raw, spelled), (scaling, "rope_theta"), (parameters, "rope_theta"))
             if name in fields]  # fmt: skip
    for what, found in (("scaling", factors), ("base", bases)):
        if len(set(found)) > 1:
            raise ConfigError(
                f"config.json: two values for the RoPE {what} of {kind} layers, {found[0]} and "
                f"{found[-1]}, in rope_parameters and outside of it; keep one"
            )
    return float(bases[0] if bases else default), float(factors[0] if factors else 1.0)


def _factor(fields: dict[str, Any]) -> float:
    is_linear = fields.get("rope_type", fields.get("type")) == "linear"
    return fields.get("factor", 1.0) if is_linear else 1.0
