"""The library transformers, for the commands that compare with it."""

import importlib
from typing import Any

from pretrain_cli.errors import ConfigError
from pretrain_cli.model.float8 import quiet_torchao


def import_transformers(who: str) -> Any:
    """The library, saying nothing of its own but errors; ConfigError where it is not installed.
    `who` needs it: a command, or an option with its value."""
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(
            f"{who}: the package transformers is not installed; pip install 'pretrain[verify]'"
        ) from None
    quiet_torchao()  # which it imports where that is installed
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library
