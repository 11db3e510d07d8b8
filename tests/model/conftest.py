"""Fixtures of the model tests: small models of transformers, with their exact results.

A reference folder is written by transformers' own save_pretrained; its logits, loss and gradients
are transformers' own, in float32 with eager attention. Weights are drawn wide (0.15, not 0.02) and
norms away from their neutral value, so that a wrong scale, window, base or order shows.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain_cli.model.config import FULL, SLIDING, ModelConfig
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.parameter_map import parameter_map

COMMON = {
    "vocab_size": 150,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,  # large enough to affect results, and no class's default
}
GEMMA = {
    **COMMON,
    "num_hidden_layers": 8,  # five sliding, one full, two sliding
    "query_pre_attn_scalar": 20,
    "sliding_window": 7,
    "rope_theta": 5000.0,
    "rope_local_base_freq": 50.0,
    "pad_token_id": 0,
}
QWEN = {**COMMON, "num_hidden_layers": 3, "rope_theta": 3000.0}
MOE = {**QWEN, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
REFERENCES = {
    "gemma3": (
        "Gemma3",
        GEMMA | {"num_key_value_heads": 2, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gemma3-untied": ("Gemma3", GEMMA | {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3", QWEN | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3-untied": ("Qwen3", QWEN | {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "moe-normalized": (
        "Qwen3Moe",
        MOE | {"num_key_value_heads": 2, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "moe-unnormalized": (
        "Qwen3Moe",
        MOE | {"num_key_value_heads": 1, "norm_topk_prob": False, "decoder_sparse_step": 2},
    ),
}
BATCH, LENGTH = 2, 33  # LENGTH is several windows of 7, but no multiple


@dataclass(frozen=True)
class Reference:
    """A model folder written by transformers, and transformers' results for it."""

    name: str
    folder: Path
    tokens: Tensor
    logits: Tensor
    """Logits of all tokens. (B, T, V)"""
    loss: Tensor
    """Mean loss of every token but the last of each row."""
    gradients: dict[str, Tensor]
    """Gradients of that loss, by published name."""


def draw_wide(model: nn.Module) -> None:
    """Draw matrices with standard deviation 0.15, and norm weights of 0.3 ± 0.3."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            centre, spread = (0.0, 0.15) if parameter.dim() > 1 else (0.3, 0.3)
            parameter.normal_(centre, spread, generator=generator)


def transformers_model(name: str) -> Any:
    """Return one of REFERENCES, with weights from draw_wide."""
    transformers = importlib.import_module("transformers")
    family, numbers = REFERENCES[name]
    config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_class)(**numbers, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    draw_wide(model)
    return model


def published_gradients(model: Any) -> dict[str, Tensor]:
    """Return gradients by published name. transformers 5 stacks experts in memory, not on disk."""
    out = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        before, _, stacked = name.partition(".experts.")
        if stacked not in ("gate_up_proj", "down_proj"):
            out[name] = grad
            continue
        for e, expert in enumerate(grad):
            parts = {"down_proj": expert}
            if stacked == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            for part, value in parts.items():
                out[f"{before}.experts.{e}.{part}.weight"] = value
    return out


@pytest.fixture(scope="session")
def make_transformers_model() -> Callable[[str], Any]:
    return transformers_model


@pytest.fixture(scope="session", params=list(REFERENCES))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return each of REFERENCES in turn."""
    model = transformers_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, COMMON["vocab_size"], (BATCH, LENGTH), generator=generator)
    tokens[:, 5] = 0  # the padding token, whose embedding transformers freezes in Gemma 3
    with torch.no_grad():
        logits = model(tokens).logits
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    gradients = published_gradients(model)
    return Reference(request.param, folder, tokens, logits, loss.detach(), gradients)


@pytest.fixture(scope="session")
def wide() -> Callable[[nn.Module], None]:
    return draw_wide


@pytest.fixture(scope="session")
def our_gradients() -> Callable[[Decoder], dict[str, Tensor]]:
    """Return a function that returns a decoder's gradients by published name."""

    def gradients(model: Decoder) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())
        pieces = parameter_map(model.config, merged=model.merged)
        out = {}
        for piece in pieces:
            grad = parameters[piece.parameter].grad
            assert grad is not None, piece.parameter
            out[piece.name] = piece.of(grad)
        return out

    return gradients


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Return a function that computes ‖a − b‖ / ‖b‖ over whole tensors."""

    def error(ours: Tensor, theirs: Tensor) -> float:
        assert ours.shape == theirs.shape
        return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()

    return error


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ModelConfig]:
    """Return a function that makes the config of a tiny Gemma 3; `family` may also be qwen3 or moe,
    and keywords change fields."""

    def make(family: str = "gemma3", **changes: Any) -> ModelConfig:
        is_gemma, is_moe = family == "gemma3", family == "moe"
        numbers: dict[str, Any] = {
            "model_type": {"gemma3": "gemma3_text", "qwen3": "qwen3", "moe": "qwen3_moe"}[family],
            "vocab_size": 60,
            "hidden_size": 32,
            "intermediate_size": 48,
            "layer_types": (SLIDING, SLIDING, FULL) if is_gemma else (FULL, FULL, FULL),
            "sliding_window": 7 if is_gemma else None,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 20 if is_gemma else 16,
            "max_position_embeddings": 256,
            "rope_theta": 5000.0,
            "rope_local_base_freq": 50.0 if is_gemma else None,
            "rope_scaling_factor": 8.0 if is_gemma else 1.0,
            "rms_norm_eps": 1e-3,
            "norm_is_zero_centered": is_gemma,
            "has_post_norms": is_gemma,
            "hidden_activation": "gelu_pytorch_tanh" if is_gemma else "silu",
            "embedding_is_scaled": is_gemma,
            "tie_word_embeddings": is_gemma,
            "initializer_range": 0.02,
            "pad_token_id": 0 if is_gemma else None,
            "num_experts": 8 if is_moe else 0,
            "num_experts_per_tok": 3 if is_moe else 0,
            "moe_intermediate_size": 24 if is_moe else 0,
            "norm_topk_prob": is_moe,
            "router_aux_loss_coef": 0.001 if is_moe else 0.0,
            "decoder_sparse_step": 1,
            "mlp_only_layers": (1,) if is_moe else (),
        }
        return ModelConfig(**numbers | changes)

    return make
