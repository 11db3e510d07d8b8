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
from pretrain_cli.engine.planning.plan import Plan, resolved
from pretrain_cli.engine.runs import checkpoint, retention
from pretrain_cli.engine.runs.events import Emit, Notice
from pretrain_cli.engine.runs.run_yaml import RUN_YAML, RunRecord, differences
from pretrain_cli.engine.runtime.distributed import device_name
from pretrain_cli.engine.runtime.peak_flops import Peak
from pretrain_cli.engine.runtime.profiler import WARMUP_STEPS
from pretrain_cli.engine.runtime.speed import DETERMINISM, Speed
from pretrain_cli.engine.training.job import Job
from pretrain_cli.engine.training.rollback import abandon_later
from pretrain_cli.errors import CheckpointError, ConfigError, DataError
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


def find_start(
    plan: Plan,
    emit: Emit,
    resume: tuple[Path, RunRecord] | None,
    resume_from: Path | None,
) -> tuple[Path, Path | None]:
    """Return (run folder, checkpoint to start from or None). Writes nothing."""
    if resume is None:
        return choose_folder(plan), None
    run, record = resume
    if plan.data.fingerprint != record.data_fingerprint:
        raise DataError(
            f"{plan.data.name}: not the dataset that {run} was trained on; give "
            f"{record.data_name} with --data, or start a new run"
        )
    if resume_from and (reason := checkpoint.find_damage(resume_from)):
        raise CheckpointError(f"{reason}; resume from the run, {run}, to take another")
    start = resume_from or retention.newest_intact(run, lambda text: emit(Notice(text)))
    if start is None:
        emit(Notice(f"{run}: no checkpoint yet; starting again from step 0"))
    return run, start


def check_steps_left(plan: Plan, run: Path, done: int, profile: int) -> None:
    """Raise ConfigError if the run has more steps than the plan, or too few left to profile."""
    if done > plan.steps:
        raise ConfigError(
            f"train.steps: {plan.steps:,} is less than the {done:,} that {run} has; give "
            "more, or resume from an earlier checkpoint of it"
        )
    if profile and plan.steps - done < WARMUP_STEPS + profile:
        raise ConfigError(
            f"--profile: {profile} steps after {WARMUP_STEPS} to warm up, and the run has "
            f"{plan.steps - done:,} left; give fewer, or more --steps"
        )


def tell_departures(speed: Speed, emit: Emit) -> None:
    """Emit a notice for each speed setting that is not in force as requested."""
    for line in speed.departures():
        emit(Notice(line))
    if speed.deterministic:
        emit(Notice(f"speed.deterministic: {DETERMINISM}"))


def begin_run(job: Job[Plan], run: Path, emit: Emit, resumed: RunRecord | None) -> None:
    """Tell what differs from the run's record, and prepare the run folder on the first rank."""
    plan, step = job.plan, job.state.step
    if resumed is not None:
        for line in changed_settings(resumed, plan, step):
            emit(Notice(line))
    if job.ranks.is_first:
        retention.sweep(run)
        write_record(run, plan, job.ranks.device, job.peak, resumed.asked if resumed else None)
        abandon_later(run, step, emit)


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
    recorded = check_config(record.settings)
    for name, old, new in differences(recorded, resolved(plan)):
        yield f"{name}: {old} → {new}"
    steps = recorded.train.steps
    if not isinstance(steps, int) or steps == plan.steps:
        return
    before, now = plan.rates_at(step, steps=steps), plan.rates_at(step)
    if before.learning_rate != now.learning_rate:
        yield (
            f"The {plan.settings.optimizer.schedule} schedule now ends at step {plan.steps:,}: the "
            f"learning rate goes on at {now.learning_rate:.3g} "
            f"instead of {before.learning_rate:.3g}"
        )
