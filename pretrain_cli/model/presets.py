"""Models by name: every published text size of both families, and one small size of each."""

from pretrain_cli.errors import ConfigError, did_you_mean
from pretrain_cli.model import gemma3, qwen3
from pretrain_cli.model.config import ModelConfig

ALIASES = {"gemma3": "gemma3-270m", "qwen3": "qwen3-0.6b"}
PUBLISHED = {**gemma3.PUBLISHED, **qwen3.PUBLISHED}
SMALL = {**gemma3.SMALL, **qwen3.SMALL}
PRESETS = {**PUBLISHED, **SMALL}


def full_name(name: str) -> str:
    """Return the full name of a preset: `gemma3` is `gemma3-270m`. Raises ConfigError for an
    unknown name."""
    name = ALIASES.get(name, name)
    if name not in PRESETS:
        known = [*ALIASES, *PRESETS]
        raise ConfigError(
            f"model: '{name}' is not a model or a YAML file{did_you_mean(name, known) or '.'} "
            f"Known: {', '.join(known)}"
        )
    return name


def preset(name: str) -> ModelConfig:
    """Return the ModelConfig of this name."""
    return PRESETS[full_name(name)]
