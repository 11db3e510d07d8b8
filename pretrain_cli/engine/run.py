"""The run folder, and what resuming a run may change.

runs/NAME/
├── run.yaml            settings as resolved and as asked, speed in force, model, dataset, software
├── metrics.jsonl       a line for each step reported and each evaluation
├── samples.jsonl       text sampled from the model
└── checkpoints/step-000400/
"""

import dataclasses
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain_cli import __version__
from pretrain_cli.config import RunConfig, check_config
from pretrain_cli.engine.plan import Plan, resolved
from pretrain_cli.errors import CheckpointError, ConfigError
from pretrain_cli.model.config import ModelConfig, variant
from pretrain_cli.model.presets import preset

RUNS = Path("runs")
RECORD = "run.yaml"
# What a resumed run may change: how long it goes, how fast, and what it reports and keeps.
CHANGEABLE = {
    "data.path",  # the fingerprint still has to be the same
    "train.steps",
    "train.micro_batch_size",
    "train.device",
    "train.parallel",
    "train.out",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.sample_prompt",
    "train.sample_tokens",
}


@dataclass(frozen=True)
class Record:
    """run.yaml of a run that exists."""

    settings: dict[str, Any]
    model: ModelConfig
    model_name: str
    dataset_fingerprint: str


def choose_folder(plan: Plan) -> Path:
    """The folder of a new run: as asked, and then without a run in it; or the next free name."""
    asked = plan.settings.train.out
    if asked is not None:
        if (asked / RECORD).exists():
            raise ConfigError(
                f"--out: {asked} holds another run; choose another folder, or continue that run "
                f"with --resume {asked}"
            )
        if asked.exists() and (not asked.is_dir() or any(asked.iterdir())):
            raise ConfigError(f"--out: {asked} is not an empty folder; choose another")
        return asked
    base = f"{plan.name}-{plan.dataset.folder.resolve().name}"
    number, folder = 1, RUNS / base
    while folder.exists():
        number += 1
        folder = RUNS / f"{base}-{number}"
    return folder


def write_record(folder: Path, plan: Plan, device: torch.device) -> None:
    """run.yaml, replaced in one step."""
    record = {
        "settings": resolved(plan).model_dump(mode="json"),
        "asked": plan.settings.model_dump(mode="json"),
        "speed": plan.speed.record(),
        "model": {"name": plan.name}
        | {k: list(v) if isinstance(v, tuple) else v for k, v in _fields(plan.model).items()},
        "dataset": {
            "path": str(plan.dataset.folder),
            "fingerprint": plan.dataset.manifest.fingerprint,
            "tokenizer": plan.dataset.manifest.tokenizer,
            "tokens": plan.dataset.manifest.total("train", "tokens"),
        },
        "software": {
            "pretrain": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{RECORD}.partial"
    aside.write_text(yaml.safe_dump(record, sort_keys=False))
    aside.replace(folder / RECORD)


def _fields(config: ModelConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def read_record(run: Path) -> Record:
    """run.yaml of a run folder."""
    path = run / RECORD
    if not path.is_file():
        raise CheckpointError(f"{run}: no {RECORD}; --resume takes the folder of a run")
    try:
        raw = yaml.safe_load(path.read_text())
        model = dict(raw["model"])
        name = model.pop("name")
        fingerprint = raw["dataset"]["fingerprint"]
        settings = raw["settings"]
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: damaged; copy it back from a backup") from None
    # every field is in the file, so nothing of the preset it starts from is left
    return Record(settings, variant(preset("gemma3-tiny"), model), name, fingerprint)


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


def device_name(device: torch.device) -> str:
    """What a person would call the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return device.type


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
