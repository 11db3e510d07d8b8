"""Pretrain Gemma 3 and Qwen 3 models: from a folder of text to a model that transformers opens.

The functions of the Python interface are loaded, and torch with them, when they are first used; see
`pretrain_cli.api`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain_cli.api import (
        Model,
        ModelConfig,
        PretrainError,
        RunConfig,
        batches,
        generate,
        load_model,
        model_config,
        open_dataset,
        run_config,
        tokenize,
        train,
    )

__version__ = "0.1.0"

__all__ = (
    "Model",
    "ModelConfig",
    "PretrainError",
    "RunConfig",
    "batches",
    "generate",
    "load_model",
    "model_config",
    "open_dataset",
    "run_config",
    "tokenize",
    "train",
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pretrain_cli' has no attribute '{name}'")
    from pretrain_cli.config.run_config import SpeedConfig
    from pretrain_cli.engine.runtime.process_settings import set_env_before_torch

    set_env_before_torch(SpeedConfig())  # what torch reads when it is loaded, which is next
    return getattr(import_module("pretrain_cli.api"), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
