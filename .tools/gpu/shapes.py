"""Models of the slots; in a rehearsal, small ones with the same kinds of layers."""

from gpu.check import Check
from pretrain_cli.model.config import FULL, SLIDING, ModelConfig, variant
from pretrain_cli.model.presets import preset

SMALLER = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "vocab_size": 320}
GEMMA = {"layer_types": (SLIDING, FULL), "query_pre_attn_scalar": 16.0, "sliding_window": 32}


def model_of(name: str, check: Check, **changes: object) -> ModelConfig:
    """Return a published model with some fields changed."""
    if not check.rehearse:
        return variant(preset(name), changes)
    return variant(preset(f"{family_of(name)}-tiny"), smaller(name) | changes)


def smaller(name: str) -> dict[str, object]:
    """Return the changes that make a tiny preset tinier."""
    own = GEMMA if family_of(name) == "gemma3" else {"num_hidden_layers": 2}
    return SMALLER | own


def family_of(name: str) -> str:
    return name.split("-")[0]
