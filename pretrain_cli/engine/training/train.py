"""Training: from datasets to a run folder with checkpoints, metrics and samples.

open the ranks → plan → choose the run folder → open the batches → set up → take steps until done or
stopped; log, evaluate, save and sample when due
"""

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.engine.planning.plan import Plan, make_plan
from pretrain_cli.engine.runs import checkpoint
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runs.events import Emit, Finished, Profiled, Started, ignore
from pretrain_cli.engine.runs.run_yaml import RunRecord
from pretrain_cli.engine.runtime.distributed import device_name, open_ranks
from pretrain_cli.engine.runtime.profiler import WARMUP_STEPS, Profiler
from pretrain_cli.engine.runtime.speed import only_deterministic
from pretrain_cli.engine.runtime.stop import Stopped, StopRequest
from pretrain_cli.engine.training.async_save import check_space, checkpoint_size
from pretrain_cli.engine.training.checkpointer import Checkpointer
from pretrain_cli.engine.training.evaluate import Evaluator
from pretrain_cli.engine.training.job import Job, set_up
from pretrain_cli.engine.training.prefetch import open_batches
from pretrain_cli.engine.training.rollback import Rollback
from pretrain_cli.engine.training.run_log import RunLog, Sampling
from pretrain_cli.engine.training.run_start import (
    COMPILED,
    begin_run,
    check_steps_left,
    find_start,
    tell_departures,
)
from pretrain_cli.engine.training.step import train_step
from pretrain_cli.engine.training.throughput import StepReport, ThroughputMeter
from pretrain_cli.model import counting

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
    stop = stop or StopRequest(limit=settings.train.max_time)
    with open_ranks(settings.train.device) as ranks:
        emit = emit if ranks.is_first else ignore
        stop.ranks = ranks
        plan = make_plan(settings, ranks, emit, stop, resumed=resume[1] if resume else None)
        run, start = find_start(plan, emit, resume, resume_from)
        done = checkpoint.read_state(start).step if start else 0
        check_space(plan, run, ranks, emit, done=done)
        check_steps_left(plan, run, done, profile)
        if ranks.is_first:  # which writes
            stop.save_seconds = checkpoint.estimated_seconds(checkpoint_size(plan))
        batches = open_batches(plan, ranks, emit)
        tell_departures(plan.speed, emit)
        job = set_up(
            plan,
            ranks,
            batches,
            start=start,
            compile_cache=run / COMPILED,
            peak_seconds=PEAK_SECONDS,
            emit=emit,
        )
        begin_run(job, run, emit, resume[1] if resume else None)
        log = RunLog(plan, run, ranks, emit, job.state)
        with closing(log), only_deterministic(plan.speed):
            return take_steps(job, log, stop, profile=profile if ranks.is_first else 0)


def take_steps(job: Job[Plan], log: RunLog, stop: StopRequest, *, profile: int) -> Finished:
    """Train until all steps are done or a stop is requested, then save."""
    plan, state, steps, reason = job.plan, job.state, job.plan.steps, "done"
    log.emit(_started(job, log.run))
    if state.step >= steps:
        log.notify(f"{log.run} has its {steps:,} steps; give more --steps to continue")
    sampling, evaluator = Sampling(job, log, stop), Evaluator(job, log, stop)
    rollback = Rollback(job, log)
    report = StepReport(job, log, rollback)
    meter = report.meter
    saves = Checkpointer(job, log, stop, rollback=rollback, evaluator=evaluator)
    profiler = _profiler(job, log.run, profile)
    try:
        state = _catch_up(state, meter, evaluator, sampling)
        while state.step < steps or rollback.reason:
            stop.check()
            if rollback.reason:
                saves.wait()  # it may be the checkpoint to go back to
                state = rollback.roll_back(state)
                saves.rolled_back(state)
                evaluator.rolled_back()
            rates = plan.rates_at(state.step)
            with profiler.step():
                result = train_step(job, job.batches.next(), rates, stop=stop.poll)
            state = report.finish(state)  # of the step before: the device is busy with this one
            state = saves.poll(_advance(state, plan))
            meter.stepped(job.batches.wait)
            if done := profiler.result():
                log.emit(Profiled(state.step, done))
            if state.step == steps or state.step % plan.log_every == 0:
                state = report.begin(state, rates.learning_rate, result.auxiliary)
            evaluation_due, sample_due = evaluator.due(state.step), sampling.due(state.step)
            save_due = saves.due(state.step)
            if evaluation_due or save_due or sample_due:
                state = report.flush(state)  # waits for the device
            if rollback.reason:
                continue
            if evaluation_due:
                with meter.held_up("evaluation"):
                    evaluator.take(state.step)
            if save_due:
                with meter.held_up("save"):
                    state = saves.save(state, keeps_training=state.step < steps)
            if sample_due and not rollback.reason:
                with meter.held_up("evaluation"):
                    sampling.take(state.step)
            stop.after(state.step)
        saves.finish()
    except Stopped:
        reason, state = "stopped", report.flush(state)
        saves.leave(state, made=state.step - job.state.step)
    finally:
        for part in (profiler, job.batches, saves, log):
            part.close()
    finished = Finished(log.run, state.step, steps, reason)
    log.emit(finished)
    return finished


def _catch_up(
    state: State, meter: ThroughputMeter, evaluator: Evaluator, sampling: Sampling
) -> State:
    """Evaluate and sample at the step that the run starts from, if a stop came before."""
    if evaluator.was_missed(state.step):
        with meter.held_up("evaluation"):
            evaluator.take(state.step)
        state = evaluator.mark_best(state)
    if sampling.due(state.step):
        with meter.held_up("evaluation"):
            sampling.take(state.step)
    return state


def _advance(state: State, plan: Plan) -> State:
    """Return the state after one more step."""
    return replace(
        state,
        step=state.step + 1,
        samples=state.samples + plan.samples_per_step,
        tokens=state.tokens + plan.tokens_per_step,
    )


def _started(job: Job[Plan], run: Path) -> Started:
    plan, peak = job.plan, job.peak
    flops = counting.training_flops(plan.model, plan.seq_len)
    return Started(
        step=job.state.step,
        time=time.time(),
        run=run,
        model=plan.name,
        parameters=counting.count_parameters(plan.model).total,
        dataset=plan.data.name,
        device=device_name(job.ranks.device),
        ranks=job.ranks.world_size,
        steps=plan.steps,
        tokens_per_step=plan.tokens_per_step,
        flops_per_token=flops.exact,
        flops_per_token_conventional=flops.conventional,
        peak_flops=peak.flops,
        peak_source=peak.source,
        peak_measured=peak.measured,
    )


def _profiler(job: Job[Plan], run: Path, steps: int) -> Profiler:
    first = job.state.step + WARMUP_STEPS + 1
    trace = run / f"profile-step-{first:06d}.json"
    return Profiler(steps, after=WARMUP_STEPS, device=job.ranks.device, trace=trace)
