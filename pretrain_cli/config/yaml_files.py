"""Read YAML files: settings of a run, from a path or shipped with the package, and models."""

from pathlib import Path
from typing import Any

import yaml

from pretrain_cli.config.run_config import ModelSettings, RunConfig
from pretrain_cli.errors import ConfigError, did_you_mean
from pretrain_cli.model.config import FIELDS, ModelConfig, variant
from pretrain_cli.model.presets import PRESETS, full_name, preset


def read_config(name: str) -> dict[str, Any]:
    """Return the tree of a run's YAML file, given its path or the name of a shipped file.

    Raises ConfigError if there is no such file, or if it has unknown sections.
    """
    path = Path(name)
    if not path.is_file():
        shipped = {file.stem: file for file in _shipped_configs()}
        if name not in shipped:
            raise ConfigError(
                f"--config: no file '{name}', and none of the built-in ones "
                f"({', '.join(shipped)}) is called that{did_you_mean(name, shipped)}"
            )
        path = shipped[name]
    tree = read_yaml(path)
    for section, values in tree.items():
        if section not in RunConfig.model_fields:
            known = ", ".join(RunConfig.model_fields)
            raise ConfigError(f"{path}: {section}: no such section; there are {known}")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {section}: {values!r} is not a section of settings")
    return tree


def find_model(settings: ModelSettings) -> tuple[str, ModelConfig]:
    """Return (short name, ModelConfig) of the model in a run's settings, with changes applied."""
    if settings.name.endswith((".yaml", ".yml")):
        name, config = Path(settings.name).stem, _model_file(Path(settings.name))
    else:
        name, config = full_name(settings.name), preset(settings.name)
    return name, variant(config, settings.changes)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises ConfigError for anything else."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{path}: not YAML ({said}); mend it") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no settings; give a mapping of section to settings")
    return tree


def _model_file(path: Path) -> ModelConfig:
    """Return a model from a YAML file, which holds every field, or `base: NAME` and changed fields.

    Raises ConfigError if the file or a field is missing.
    """
    if not path.is_file():
        raise ConfigError(f"model: no file {path}; give a YAML file or one of {', '.join(PRESETS)}")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: {base!r} is not a model; give a name")
        return variant(preset(base), tree)
    missing = sorted(set(FIELDS) - set(tree))
    if missing:
        raise ConfigError(
            f"{path}: {missing[0]} is missing; state every number of the model, or start from a "
            "known one with 'base: NAME'"
        )
    return variant(preset("gemma3-tiny"), tree)


def _shipped_configs() -> list[Path]:
    """Return the YAML files of configs/: in the installed package, or beside it in a checkout."""
    here = Path(__file__).parent.parent
    for folder in (here / "configs", here.parent / "configs"):
        if folder.is_dir():
            return sorted(folder.glob("*.yaml"))
    return []
