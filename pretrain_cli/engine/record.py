"""run.yaml read back, and what a resumed run may change of it. Without torch, so that a command can
know a run's settings before torch is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain_cli.config import RunConfig, check_config
from pretrain_cli.errors import CheckpointError, ConfigError
from pretrain_cli.model.config import FIELDS, ModelConfig, variant
from pretrain_cli.model.presets import preset

RECORD = "run.yaml"
# What a resumed run may change: how long it goes, how fast, and what it reports and keeps.
CHANGEABLE = {
    "data.path",  # the fingerprint still has to be the same
    "data.tokenizer",
    "train.steps",
    "train.tokens",
    "train.micro_batch_size",
    "train.device",
    "train.parallel",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.skip_spikes",
    "train.max_skips",
    "train.max_rollbacks",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.keep_every",
    "train.max_time",
    "train.sample_prompts",
    "train.sample_tokens",
    "train.sample_every",
    "train.log",
}


@dataclass(frozen=True)
class Record:
    """run.yaml of a run that exists."""

    settings: dict[str, Any]
    asked: dict[str, Any]
    model: ModelConfig
    model_name: str
    data_name: str
    data_fingerprint: str


def read_record(run: Path) -> Record:
    """run.yaml of a run folder."""
    path = run / RECORD
    if not path.is_file():
        raise CheckpointError(f"{run}: no {RECORD}; --resume takes the folder of a run")
    try:
        raw = yaml.safe_load(path.read_text())
        model = dict(raw["model"])
        name = model.pop("name")
        data = raw["dataset"]["path"], raw["dataset"]["fingerprint"]
        settings, asked = raw["settings"], raw["asked"]
        if missing := set(FIELDS) - set(model):
            raise KeyError(missing)
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: damaged; copy it back from a backup") from None
    # every field is in the file, so nothing of the preset it starts from is left
    return Record(settings, asked, variant(preset("gemma3-tiny"), model), name, *data)


def resumed_settings(record: Record, changed: RunConfig) -> RunConfig:
    """The run's settings with the changes that a resumed run may have; others are refused."""
    before = check_config(record.settings).model_dump()
    for section, values in changed.model_dump().items():
        for key, value in values.items():
            name = f"{section}.{key}"
            if value != before[section].get(key) and section != "speed" and name not in CHANGEABLE:
                raise ConfigError(
                    f"{name}: {value} differs from the run's {before[section].get(key)}; a resumed "
                    "run keeps it. Start a new run, from these weights with --init-from"
                )
    return changed
