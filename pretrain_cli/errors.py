"""People's mistakes. Each message says what is wrong, the value, and what to do.

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
    """A mistake of the user's. The message is one line: the fault, the value, and what to do."""


class ConfigError(PretrainError):
    """A setting, an option or a device that can't be honoured."""


class DataError(PretrainError):
    """Text, a tokenizer or a tokenized dataset that can't be used as it is."""


class CheckpointError(PretrainError):
    """A checkpoint, a run folder or a model folder that can't be used as it is."""


NEAR = 0.6
"""Least similarity of two names: the share of letters they have in common in the same order. fleks
and flex have 0.67; epochs and steps 0.55, fp16 and bfloat16 0.5."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known name, or nothing where none is near. The section
    that a setting has in common with all others makes it no nearer."""
    known, section = list(known), name[: name.rfind(".") + 1]
    if not all(other.startswith(section) for other in known):
        section = ""
    others = {other.removeprefix(section): other for other in known}
    near = difflib.get_close_matches(name.removeprefix(section), others, n=1, cutoff=NEAR)
    return f"; did you mean {others[near[0]]}?" if near else ""
