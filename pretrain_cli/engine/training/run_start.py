"""The start of a run: choosing its folder and writing run.yaml.

runs/NAME/
├── run.yaml            settings as given and as resolved, model, dataset, software versions
├── metrics.jsonl       a line for each logged step, evaluation and save
├── samples.jsonl       text sampled from the model
├── compile-cache/      code from torch.compile, reused when the run resumes; safe to remove
├── profile-step-*.json Chrome traces, with --profile
└── checkpoints/step-000400/
"""

import dataclasses
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain_cli import __version__
from pretrain_cli.config.build import check_config
from pretrain_cli.engine.optim.schedule import learning_rate
from pretrain_cli.engine.planning.plan import Plan, resolved
from pretrain_cli.engine.runs.run_yaml import RUN_YAML, RunRecord, differences
from pretrain_cli.engine.runtime.distributed import device_name
from pretrain_cli.engine.runtime.peak_flops import Peak
from pretrain_cli.errors import ConfigError
from pretrain_cli.files import write_whole
from pretrain_cli.model.config import ModelConfig

RUNS = Path("runs")
COMPILED = "compile-cache"


def choose_folder(plan: Plan) -> Path:
    """Return the folder of a new run: the one asked for, if it holds no run yet, or the next free
    name."""
    asked = plan.settings.train.out
    if asked is not None:
        if (asked / RUN_YAML).exists():
            raise ConfigError(
                f"--out: {asked} holds another run; choose another folder, or continue that run "
                f"with --resume {asked}"
            )
        if asked.exists() and (not asked.is_dir() or any(asked.iterdir())):
            raise ConfigError(f"--out: {asked} is not an empty folder; choose another")
        return asked
    base = "-".join([plan.name, *(source.dataset.name for source in plan.data.sources)])
    number, folder = 1, RUNS / base
    while folder.exists():
        number += 1
        folder = RUNS / f"{base}-{number}"
    return folder


def write_record(
    folder: Path,
    plan: Plan,
    device: torch.device,
    peak: Peak,
    asked: dict[str, Any] | None = None,
) -> None:
    """Write run.yaml atomically. A resumed run passes the settings that were given at its start."""
    record = {
        "settings": resolved(plan).model_dump(mode="json"),
        "asked": asked or plan.settings.model_dump(mode="json"),
        "speed": plan.speed.record(),
        "model": {"name": plan.name}
        | {k: list(v) if isinstance(v, tuple) else v for k, v in _fields(plan.model).items()},
        "dataset": {
            "path": plan.data.name,
            "fingerprint": plan.data.fingerprint,
            "tokenizer": plan.data.tokenizer.name,
            "tokens": sum(len(source.dataset.train.tokens) for source in plan.data.sources),
        },
        "software": {
            "pretrain": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "machine": {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "micro_batch_size": plan.micro_batch_size,
            "micro_batch_is": plan.micro_batch_reason or "as asked",
            "peak": dataclasses.asdict(peak),
        },
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: {folder} can't be made ({error.strerror}); choose another folder"
        ) from None
    write_whole(folder / RUN_YAML, yaml.safe_dump(record, sort_keys=False))


def _fields(config: ModelConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def changed_settings(record: RunRecord, plan: Plan, step: int) -> Iterator[str]:
    """Describe each setting that differs from the run's record, and the effect of more steps on the
    schedule, a line each."""
    before = check_config(record.settings)
    for name, old, new in differences(before, resolved(plan)):
        yield f"{name}: {old} → {new}"
    steps = before.train.steps
    if not isinstance(steps, int) or steps == plan.steps:
        return
    rates = [
        learning_rate(
            step,
            peak=plan.learning_rate,
            steps=length,
            warmup_steps=plan.warmup_steps,
            settings=plan.settings.optimizer,
        )
        for length in (steps, plan.steps)
    ]
    if rates[0] != rates[1]:
        yield (
            f"The {plan.settings.optimizer.schedule} schedule now ends at step {plan.steps:,}: the "
            f"learning rate goes on at {rates[1]:.3g} instead of {rates[0]:.3g}"
        )
