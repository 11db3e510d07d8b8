"""Training: from datasets to a run folder with checkpoints, metrics and samples.

open the ranks → plan → open the batches → build the model → set its weights → apply speed settings
→ build the optimizer → resume → train_step until done or stopped, evaluating and saving when due
"""

from pathlib import Path

import torch

from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.engine.optim.optimizer import build_optimizer
from pretrain_cli.engine.planning.plan import Plan, make_plan
from pretrain_cli.engine.runs import checkpoint, retention
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runs.events import Emit, Event, Finished, Notice
from pretrain_cli.engine.runs.run_yaml import RunRecord
from pretrain_cli.engine.runtime.distributed import open_ranks, parallelize
from pretrain_cli.engine.runtime.peak_flops import find_peak
from pretrain_cli.engine.runtime.process_settings import set_compile_cache
from pretrain_cli.engine.runtime.profiler import WARMUP_STEPS
from pretrain_cli.engine.runtime.speed import (
    DETERMINISM,
    apply_process_settings,
    build_model,
    compile_blocks,
    only_deterministic,
)
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.engine.training.async_save import check_space, checkpoint_size
from pretrain_cli.engine.training.prefetch import open_batches
from pretrain_cli.engine.training.run_start import (
    COMPILED,
    changed_settings,
    choose_folder,
    write_record,
)
from pretrain_cli.engine.training.trainer import Trainer
from pretrain_cli.errors import CheckpointError, ConfigError, DataError
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.hf_weights import load_weights, say_left_out

PEAK_SECONDS = 0.2
"""Seconds for measuring the device's peak FLOP/s. The best of a few matrix products is within a few
percent of a longer search, at no noticeable cost."""


def train(
    settings: RunConfig,
    emit: Emit,
    *,
    resume: tuple[Path, RunRecord] | None = None,
    resume_from: Path | None = None,
    stop: StopRequest | None = None,
    profile: int = 0,
) -> Finished:
    """Train a new run, or resume the run at `resume`, and return how it ended.

    A resumed run starts from the named checkpoint, else from its newest intact one. `profile` is
    the number of steps to profile on the first rank. Raises Stopped if `stop` requests it before
    the run exists.
    """
    if stop is None:
        stop = StopRequest(limit=settings.train.max_time)
    with open_ranks(settings.train.device) as ranks:
        if not ranks.is_first:
            emit = _silent
        stop.ranks = ranks
        plan = make_plan(settings, ranks, emit, stop, resumed=resume[1] if resume else None)
        run, start = _choose_run(plan, emit, resume, resume_from)
        done = checkpoint.read_state(start).step if start else 0
        check_space(plan, run, ranks, emit, done=done)
        if ranks.is_first:  # which writes
            stop.save_seconds = checkpoint.estimated_seconds(checkpoint_size(plan))
        batches = open_batches(plan, ranks, emit)
        torch.manual_seed(settings.train.seed)  # nothing draws from it yet; a checkpoint keeps it
        apply_process_settings(plan.speed)
        for said in plan.speed.departures():
            emit(Notice(said))
        if plan.speed.deterministic:
            emit(Notice(f"speed.deterministic: {DETERMINISM}"))

        peak = find_peak(ranks.device, plan.speed.compute_dtype, seconds=PEAK_SECONDS)
        decoder = build_model(plan.model, plan.speed, ranks.device)
        set_weights(decoder, plan, start, emit)
        if plan.speed.compile:
            set_compile_cache(run / COMPILED)
        compile_blocks(decoder, plan.speed)
        model = parallelize(decoder, ranks, plan.settings.train.parallel)
        optimizer = build_optimizer(
            decoder, plan.settings.optimizer, fused=plan.speed.fused_optimizer
        )
        state = State()
        if start is not None:
            state = checkpoint.load_training_state(start, decoder, optimizer)
        if state.step > plan.steps:
            raise ConfigError(
                f"train.steps: {plan.steps:,} is less than the {state.step:,} that {run} has; give "
                "more, or resume from an earlier checkpoint of it"
            )
        if profile and plan.steps - state.step < WARMUP_STEPS + profile:
            raise ConfigError(
                f"--profile: {profile} steps after {WARMUP_STEPS} to warm up, and the run has "
                f"{plan.steps - state.step:,} left; give fewer, or more --steps"
            )
        if resume is not None:
            for line in changed_settings(resume[1], plan, state.step):
                emit(Notice(line))
        if ranks.is_first:
            retention.sweep(run)
            write_record(run, plan, ranks.device, peak, resume[1].asked if resume else None)
            for left in retention.abandon_later(run, state.step):
                emit(Notice(f"{left}: beyond step {state.step:,}, renamed to abandoned-…"))
        trainer = Trainer(plan, run, ranks, emit, batches, decoder, model, optimizer, peak)
        trainer.profile = profile if ranks.is_first else 0
        with only_deterministic(plan.speed):
            return trainer.run_until(plan.steps, state, stop)


def _choose_run(
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


def set_weights(decoder: Decoder, plan: Plan, start: Path | None, emit: Emit) -> None:
    """Load the weights of the checkpoint or of --init-from, or initialize them from the seed."""
    folder = start or plan.settings.model.init_from
    if folder is None:
        decoder.initialize(plan.settings.train.seed)
        return
    left_out = load_weights(decoder, folder)
    if left_out:
        emit(Notice(say_left_out(folder, left_out)))


def _silent(event: Event) -> None:
    """Ignore an event; for ranks other than the first."""
