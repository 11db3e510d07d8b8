"""Exceptions for users' mistakes. Each message gives the fault, the value, and what to do.

PretrainError
├── ConfigError       a setting, an option, a device
├── DataError         text, a tokenizer, a tokenized dataset
└── CheckpointError   a checkpoint, a run folder, a model folder

The command line prints them as one line and exits with code 2; any other exception is a bug and
keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class PretrainError(Exception):
    """A user's mistake. The message is one line: the fault, the value, and what to do."""


class ConfigError(PretrainError):
    """A setting, an option or a device that can't be used."""


class DataError(PretrainError):
    """Text, a tokenizer or a tokenized dataset that can't be used as it is."""


class CheckpointError(PretrainError):
    """A checkpoint, a run folder or a model folder that can't be used as it is."""


NEAR = 0.6
"""Minimum similarity for a suggestion: the share of letters two names have in common in the same
order. fleks and flex: 0.67; epochs and steps: 0.55; fp16 and bfloat16: 0.5."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the most similar known name; empty if none is similar enough.
    If all known names begin with the section of `name` (as `speed.`), the section is ignored."""
    known, section = list(known), name[: name.rfind(".") + 1]
    if not all(other.startswith(section) for other in known):
        section = ""
    others = {other.removeprefix(section): other for other in known}
    near = difflib.get_close_matches(name.removeprefix(section), others, n=1, cutoff=NEAR)
    return f"; did you mean {others[near[0]]}?" if near else ""
