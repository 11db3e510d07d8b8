"""Merge settings from a file, flags and `--set` into one checked RunConfig.

Later sources override earlier ones:

    defaults  <  --config FILE  <  flags and --set section.name=value
"""

import re
from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import ValidationError

from pretrain_cli.config.run_config import OptimizerSettings, RunConfig
from pretrain_cli.errors import ConfigError, did_you_mean


def build_config(
    base: dict[str, Any], flags: dict[str, Any], assignments: Iterable[str]
) -> RunConfig:
    """Return a RunConfig from a file's tree, flags by dotted name (None if not given) and `--set`
    assignments such as `train.steps=100`. Raises ConfigError for the first mistake."""
    tree = {name: dict(section) for name, section in base.items()}
    given = {name: value for name, value in flags.items() if value is not None}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name.count(".") != 1:
            raise ConfigError(f"--set {assignment}: not of the form section.name=value")
        try:
            given[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {assignment}: '{text}' is not a YAML value") from None
    # steps and tokens exclude each other: a flag or --set for one removes the file's other one
    for name, other in (("steps", "tokens"), ("tokens", "steps")):
        if f"train.{name}" in given and f"train.{other}" not in given:
            tree.get("train", {}).pop(other, None)
    for name, value in given.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    return check_config(tree)


def check_config(tree: dict[str, Any]) -> RunConfig:
    """Return the tree as a RunConfig. Raises ConfigError with one line about the first mistake."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as failure:
        raise ConfigError(_first_fault(failure)) from None
    if config.train.tokens is not None and config.train.steps != "auto":
        raise ConfigError(
            f"train.tokens: {config.train.tokens} and train.steps: {config.train.steps} are both "
            "given; give one of them"
        )
    if config.train.sample_every and not config.train.sample_tokens:
        raise ConfigError(
            f"train.sample_every: {config.train.sample_every} is how often to sample, and "
            "train.sample_tokens is 0; give it a length, or leave sample_every out"
        )
    _refuse_unused(config.optimizer)
    loss = config.speed.chunked_loss
    if isinstance(loss, str) and config.optimizer.z_loss:
        raise ConfigError(f"speed.chunked_loss: '{loss}' has no optimizer.z_loss; use true")
    return config


OF_MUON = tuple(
    name for name in OptimizerSettings.model_fields if name.startswith(("momentum", "muon_"))
)
"""Settings that have a meaning for Muon alone."""


def _refuse_unused(optimizer: OptimizerSettings) -> None:
    """Raise ConfigError for a changed setting that has no effect with the other settings."""
    schedule, name = optimizer.schedule, optimizer.name
    for setting, is_used, reason in (
        *((setting, name in ("muon", "auto"), f"optimizer.name '{name}'") for setting in OF_MUON),
        ("decay_fraction", schedule.startswith("wsd"), f"optimizer.schedule '{schedule}'"),
        ("final_fraction", schedule != "constant", f"optimizer.schedule '{schedule}'"),
    ):
        value = getattr(optimizer, setting)
        if not is_used and value != OptimizerSettings.model_fields[setting].default:
            raise ConfigError(
                f"optimizer.{setting}: {value} has no meaning with {reason}; leave it out"
            )


def _first_fault(failure: ValidationError) -> str:
    """Return pydantic's first error as `section.name: VALUE is not EXPECTED`, with suggestions."""
    fault = failure.errors()[0]
    path = [str(part) for part in fault["loc"]]
    fields: dict[str, Any] = RunConfig.model_fields
    if path[0] not in fields:
        return f"{path[0]}: no such section; there are {', '.join(fields)}"
    section = fields[path[0]].annotation
    if len(path) > 1 and path[1] not in section.model_fields:
        known = [f"{path[0]}.{name}" for name in section.model_fields]
        name = ".".join(path[:2])
        return f"{name}: no such setting{did_you_mean(name, known)}"
    value = fault["input"]
    shown = f"'{value}'" if isinstance(value, str) else repr(value)
    # Pydantic reports each branch of a union; all of them together list the accepted values.
    branches: list[Any] = [e for e in failure.errors() if e["loc"][:2] == fault["loc"][:2]]
    taken = dict.fromkeys(_taken(branch) for branch in branches)
    words = [b["ctx"]["expected"] for b in branches if b["type"] == "literal_error"]
    near = did_you_mean(str(value), re.findall(r"'(\w+)'", " ".join(words)))
    return f"{'.'.join(path[:2])}: {shown} is not {' or '.join(taken)}{near}"


def _taken(branch: Any) -> str:
    """Return in words what one branch of a setting's type accepts."""
    if branch["type"] == "literal_error":
        choices = branch["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"one of {choices}" if "," in choices else choices
    if branch["type"] in ("missing", "too_long"):
        return "a pair of numbers"  # betas is the only setting of that kind
    kind, _, how = branch["type"].partition("_")
    if how in ("parsing", "type", "from_float"):
        names = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        return names.get(kind, f"a {kind}")
    return branch["msg"].removeprefix("Input should be ")
