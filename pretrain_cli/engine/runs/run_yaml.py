"""Read run.yaml, and check what a resumed run may change. Imports no torch, so that a command knows
the settings of a run before torch is loaded."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain_cli.config.build import build_config, check_config
from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.errors import CheckpointError, ConfigError
from pretrain_cli.model.config import FIELDS, ModelConfig, variant
from pretrain_cli.model.presets import preset

RUN_YAML = "run.yaml"
# Settings that a resumed run may change, because they do not change what a step learns: duration,
# device, reporting, checkpoints. All speed settings may change, too. More steps stretch the
# learning rate schedule; the resumed run prints a notice of that.
SAFE = {
    "data.path",  # only the path: the fingerprint must match
    "data.tokenizer",
    "train.steps",
    "train.tokens",
    "train.micro_batch_size",
    "train.device",
    "train.parallel",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.max_rollbacks",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.keep_every",
    "train.max_shard_size",
    "train.max_time",
    "train.sample_prompts",
    "train.sample_tokens",
    "train.sample_every",
    "train.log",
}
REMOVED_SPEED_SETTINGS = ("huge_pages",)
"""Settings of earlier versions that never changed results; ignored in old runs."""
EARLIER: dict[str, dict[str, Any]] = {
    "model": {"initialization": "normal"},
    "optimizer": {
        "momentum_start": None,
        "momentum_end": None,
        "muon_polynomial": "quintic",
        "muon_beta2": 0.0,
        "muon_cautious_decay": False,
        "embedding_decay_scale": 1.0,
        "weight_decay_schedule": "constant",
    },
}
"""Values of settings in runs of versions that did not have them."""
ORDER = "it decides which sample is the next, and some would come twice or never"
REFUSED = {
    "model": "the weights are of that model",
    "data.seq_len": ORDER,
    "data.packing": ORDER,
    "train.seed": ORDER,
    "train.out": "a run is where its folder is; move that",
    "optimizer.name": "what is saved is the other optimizer's state",
}
"""Settings, or whole sections, that a resumed run may not change, with the reason. Settings in
neither table change what is learned, as a learning rate does, and need --allow-change."""


@dataclass(frozen=True)
class RunRecord:
    """Contents of a run's run.yaml."""

    settings: dict[str, Any]
    asked: dict[str, Any]
    model: ModelConfig
    model_name: str
    data_name: str
    data_fingerprint: str
    machine: str
    micro_batch_size: int


def read_record(run: Path) -> RunRecord:
    """Read run.yaml of a run folder."""
    path = run / RUN_YAML
    if not path.is_file():
        raise CheckpointError(f"{run}: no {RUN_YAML}; --resume takes the folder of a run")
    try:
        raw = yaml.safe_load(path.read_text())
        model = dict(raw["model"])
        name = model.pop("name")
        data = raw["dataset"]["path"], raw["dataset"]["fingerprint"]
        machine = raw["machine"]["device"], raw["machine"]["micro_batch_size"]
        settings, asked = raw["settings"], raw["asked"]
        for tree in (settings, asked):
            for removed in REMOVED_SPEED_SETTINGS:
                tree["speed"].pop(removed, None)
        for section, values in EARLIER.items():
            settings[section] = values | settings[section]
        if missing := set(FIELDS) - set(model):
            raise KeyError(missing)
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: damaged; copy it back from a backup") from None
    # the file has every field, so the choice of preset does not matter
    return RunRecord(settings, asked, variant(preset("gemma3-tiny"), model), name, *data, *machine)


def settings_to_resume(
    run: Path, changes: Mapping[str, Any], assignments: Iterable[str], *, allow_change: bool
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the settings of a run, or of one of its checkpoints, with changes by dotted name.

    The second value holds train()'s arguments `resume`, the run folder and its record, and
    `resume_from`, the checkpoint; None for the newest intact one.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run folder")
    checkpoint = None
    if run.parent.name == "checkpoints":
        checkpoint, run = run, run.parent.parent
    record = read_record(run)
    base = {name: dict(section) for name, section in record.settings.items()}
    base["train"].pop("max_time", None)  # the limit of the earlier process only
    if changes.get("train.tokens") is not None:
        base["train"].pop("steps")
    changed = build_config(base, dict(changes), assignments)
    settings = resumed_settings(record, changed, allow_change=allow_change)
    return settings, {"resume": (run, record), "resume_from": checkpoint}


def resumed_settings(
    record: RunRecord, changed: RunConfig, *, allow_change: bool = False
) -> RunConfig:
    """Return the settings of a resumed run. Raises ConfigError for a change that is refused, or
    that needs --allow-change."""
    for name, before, now in differences(check_config(record.settings), changed):
        section = name.partition(".")[0]
        differs = f"{name}: {now} differs from the run's {before}"
        if reason := REFUSED.get(name, REFUSED.get(section)):
            raise ConfigError(
                f"{differs}; a resumed run keeps it: {reason}. Start a new run, from these weights "
                "with --init-from"
            )
        if section != "speed" and name not in SAFE and not allow_change:
            raise ConfigError(
                f"{differs}; this changes what the run learns from here on. To do it anyway, "
                "add --allow-change"
            )
        if name == "train.tokens_per_step" and changed.train.tokens is not None:
            raise ConfigError(
                f"{differs}, and how many steps come to --tokens {changed.train.tokens} is counted "
                "in steps of one size; give --steps"
            )
    return changed


def differences(before: RunConfig, now: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Return (setting, before, now) for each setting that differs."""
    old, new = before.model_dump(), now.model_dump()
    for section, values in new.items():
        for key in values | old[section]:
            one, other = old[section].get(key), values.get(key)
            if one != other:
                yield f"{section}.{key}", one, other
