"""GGUF metadata and tensor names of a model, for llama.cpp.

llama.cpp derives much of the computation from the architecture's name: the attention scale, the
activation and the details of expert blocks. A model that differs in these is refused, because
llama.cpp would open it and compute something else.

Source: src/models/{gemma3,qwen3,qwen3moe}.cpp of llama.cpp. A test opens the files with it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pretrain_cli.errors import ConfigError
from pretrain_cli.model.config import FULL, SLIDING, ModelConfig
from pretrain_cli.model.parameter_map import Merged, PublishedTensor, parameter_map

DEPTH_OF_27B = 62
"""Depth of the 27B: llama.cpp recognizes that size, and its attention scale, by depth alone."""


def _gemma3_scale(config: ModelConfig) -> float:
    if config.num_hidden_layers == DEPTH_OF_27B:
        return config.hidden_size // config.num_attention_heads
    return config.head_dim


def _qwen3_scale(config: ModelConfig) -> float:
    return config.head_dim


class LlamaCpp(NamedTuple):
    """A family as llama.cpp computes it."""

    architecture: str
    activation: str
    scale: Callable[[ModelConfig], float]
    """config -> the query_pre_attn_scalar that llama.cpp takes."""


FAMILIES = {
    "gemma3_text": LlamaCpp("gemma3", "gelu_pytorch_tanh", _gemma3_scale),
    "qwen3": LlamaCpp("qwen3", "silu", _qwen3_scale),
    "qwen3_moe": LlamaCpp("qwen3moe", "silu", _qwen3_scale),
}

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
"""Published name to GGUF name, within a block. The experts of a layer are stacked in one tensor."""
NORM_NAMES = {
    True: {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    False: {"post_attention_layernorm": "ffn_norm"},
}
"""GGUF names of the norms that differ between the families, by `has_post_norms`."""
BLOCK_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"experts\.\d+\.")


def gguf_metadata(config: ModelConfig) -> dict[str, Any]:
    """Return the architecture's keys and values. Raises ConfigError for a model that llama.cpp
    cannot compute."""
    family = _family(config)
    facts: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
    }
    if config.rope_scaling_factor != 1.0:  # llama.cpp too scales only full layers
        facts["rope.scaling.type"] = "linear"
        facts["rope.scaling.factor"] = float(config.rope_scaling_factor)
    if SLIDING in config.layer_types:
        facts["attention.sliding_window"] = config.sliding_window
        facts["attention.sliding_window_pattern"] = _pattern(config.layer_types)
        facts["rope.freq_base_swa"] = float(config.rope_base(SLIDING)[0])
    if config.num_experts:
        facts["expert_count"] = config.num_experts
        facts["expert_used_count"] = config.num_experts_per_tok
        facts["expert_feed_forward_length"] = config.moe_intermediate_size
    return {f"{family.architecture}.{key}": value for key, value in facts.items()}


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """A tensor of the file: one published tensor, or those of all experts stacked."""

    name: str
    pieces: list[PublishedTensor]

    @property
    def is_stacked(self) -> bool:
        return self.name.endswith("_exps.weight")

    @property
    def is_norm(self) -> bool:
        return self.pieces[0].is_norm

    @property
    def stays_float32(self) -> bool:
        """True if the tensor stays float32 whatever the type of other weights: norms and
        routers."""
        return self.is_norm or self.name.endswith("ffn_gate_inp.weight")

    @property
    def shape(self) -> tuple[int, ...]:
        each = self.pieces[0].shape
        return (len(self.pieces), *each) if self.is_stacked else each


def gguf_tensors(config: ModelConfig, merged: Merged) -> list[FileTensor]:
    """Return the tensors of the file, made of parts of our parameters."""
    found: dict[str, list[PublishedTensor]] = {}
    for piece in parameter_map(config, merged=merged):
        found.setdefault(gguf_name(config, piece.name), []).append(piece)
    return [FileTensor(name=name, pieces=pieces) for name, pieces in found.items()]


def gguf_name(config: ModelConfig, published: str) -> str:
    stem = published.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    match = BLOCK_TENSOR.fullmatch(stem)
    assert match, published
    names = BLOCK_NAMES | NORM_NAMES[config.has_post_norms]
    return f"blk.{match[1]}.{names[EXPERT.sub('experts.', match[2])]}.weight"


def _pattern(kinds: tuple[str, ...]) -> int | list[bool]:
    """Return n if exactly every n-th layer is full, the form that older versions of llama.cpp read
    too; else a list of which layers slide."""
    for n in range(2, len(kinds) + 2):
        if all((kind == FULL) == (layer % n == n - 1) for layer, kind in enumerate(kinds)):
            return n
    return [kind == SLIDING for kind in kinds]


def _family(config: ModelConfig) -> LlamaCpp:
    """Return llama.cpp's row of the model. Raises ConfigError if it computes something else."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(
            f"--gguf: llama.cpp's form of {config.model_type} is not known here; without --gguf "
            "this model can be exported"
        )
    name_there = family.architecture
    dense = sum(not config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    for name, value, wanted in (
        ("query_pre_attn_scalar", config.query_pre_attn_scalar, family.scale(config)),
        ("hidden_activation", config.hidden_activation, family.activation),
        ("norm_topk_prob", config.norm_topk_prob or not config.num_experts, True),
    ):  # fmt: skip
        if value != wanted:
            raise ConfigError(
                f"--gguf: {name} is {value}, and llama.cpp computes {name_there} with {wanted}; "
                "without --gguf this model can be exported"
            )
    if config.num_experts and dense:
        raise ConfigError(
            f"--gguf: {dense} of {config.num_hidden_layers} layers have no experts "
            f"(mlp_only_layers, decoder_sparse_step), and llama.cpp gives every layer of "
            f"{name_there} experts; without --gguf this model can be exported"
        )
    return family
