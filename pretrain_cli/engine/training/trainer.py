"""A run in progress: its steps, and the evaluations, saves and log lines between them."""

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn
from torch.optim import Optimizer

from pretrain_cli.data.batches import Batches
from pretrain_cli.engine.optim.optimizer import set_learning_rate
from pretrain_cli.engine.optim.schedule import learning_rate
from pretrain_cli.engine.planning.plan import Plan
from pretrain_cli.engine.runs import retention
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runs.events import (
    Emit,
    Evaluation,
    Event,
    Finished,
    Notice,
    Profiled,
    Started,
)
from pretrain_cli.engine.runtime.distributed import Ranks, device_name
from pretrain_cli.engine.runtime.peak_flops import Peak
from pretrain_cli.engine.runtime.profiler import WARMUP_STEPS, Profiler
from pretrain_cli.engine.runtime.stop import Stopped, StopRequest
from pretrain_cli.engine.training.async_save import AsyncSaver
from pretrain_cli.engine.training.auxiliary_losses import AuxiliaryLosses
from pretrain_cli.engine.training.evaluate import evaluate
from pretrain_cli.engine.training.prefetch import Prefetcher
from pretrain_cli.engine.training.rollback import Rollback
from pretrain_cli.engine.training.run_log import RunLog, SampleLog
from pretrain_cli.engine.training.step import train_step
from pretrain_cli.engine.training.step_guard import StepGuard
from pretrain_cli.engine.training.throughput import ThroughputMeter
from pretrain_cli.errors import ConfigError
from pretrain_cli.model import counting
from pretrain_cli.model.decoder import Decoder


class Trainer:
    """A run in progress: takes steps, and evaluates, saves and logs when due."""

    def __init__(
        self,
        plan: Plan,
        run: Path,
        ranks: Ranks,
        emit: Emit,
        batches: Batches,
        decoder: Decoder,
        model: nn.Module,
        optimizer: Optimizer,
        peak: Peak,
    ) -> None:
        self.plan, self.run, self.ranks, self.batches, self.peak = plan, run, ranks, batches, peak
        self.decoder, self.model, self.optimizer = decoder, model, optimizer
        self.tell = emit
        self.saved_step = -1
        self.evaluated_step = -1
        self.evaluation: Evaluation | None = None
        self.profile = 0
        """Number of steps to profile, after a few for warm-up."""
        self.outputs = RunLog(plan, run, self.emit, emit)
        train = plan.settings.train
        self.guard = StepGuard(ranks, skip_spikes=train.skip_spikes, max_skips=train.max_skips)
        self.saver = AsyncSaver(run, plan, ranks, self.emit, self.outputs.sync)

    def emit(self, event: Event) -> None:
        self.outputs.take(event)
        self.tell(event)

    def run_until(self, steps: int, state: State, stop: StopRequest) -> Finished:
        """Train until `steps` are done or a stop is requested, then save."""
        plan, ranks = self.plan, self.ranks
        self.stop = stop
        if ranks.is_first:
            self.outputs.open(state)
        self.guard.load_state_dict(state.guard)
        flops = counting.training_flops(plan.model, plan.seq_len)
        self.saved_step = state.step  # of which there is nothing new to save
        started = Started(
            step=state.step,
            time=time.time(),
            run=self.run,
            model=plan.name,
            parameters=counting.count_parameters(plan.model).total,
            dataset=plan.data.name,
            device=device_name(ranks.device),
            ranks=ranks.world_size,
            steps=steps,
            tokens_per_step=plan.tokens_per_step,
            flops_per_token=flops.exact,
            flops_per_token_conventional=flops.conventional,
            peak_flops=self.peak.flops,
            peak_source=self.peak.source,
            peak_measured=self.peak.measured,
        )
        self.emit(started)
        if state.step < steps:
            self.outputs.begin(started)
        meter = ThroughputMeter(
            ranks,
            flops=flops,
            peak=self.peak.flops,
            tokens_per_step=plan.tokens_per_step,
            tokens=state.tokens,
            before=self.outputs.before,
        )
        feed = Prefetcher(
            self.batches,
            first_sample=state.samples,
            device=ranks.device,
            prefetch=plan.speed.prefetch,
        )
        samples = SampleLog(plan, self.run, ranks, self.emit, upto=state.step)
        profiler = Profiler(
            self.profile,
            after=WARMUP_STEPS,
            device=ranks.device,
            trace=self.run / f"profile-step-{state.step + WARMUP_STEPS + 1:06d}.json",
        )
        self.recovery = Rollback(
            self.guard,
            plan,
            self.run,
            ranks,
            self.emit,
            feed,
            self.decoder,
            self.model,
            self.optimizer,
        )
        first, stopped = state.step, False
        if state.step >= steps:
            self.emit(Notice(f"{self.run} has its {steps:,} steps; give more --steps to continue"))
        try:
            if self._missed_evaluation(state):
                with meter.held_up("evaluation"):
                    self.evaluate(state)
                state = self._with_best(state)
            if samples.due(state.step):  # a stop came before
                with meter.held_up("evaluation"):
                    samples.take(self.decoder, state.step, stop)
            while state.step < steps or self.recovery.rollback_reason:
                stop.check()
                if self.recovery.rollback_reason:
                    state = self.roll_back(state)
                    samples.truncate_after(state.step)
                rate = learning_rate(
                    state.step,
                    peak=plan.learning_rate,
                    steps=steps,
                    warmup_steps=plan.warmup_steps,
                    settings=plan.settings.optimizer,
                )
                set_learning_rate(self.optimizer, rate)
                terms = AuxiliaryLosses(plan.coefficients) if plan.coefficients else None
                with profiler.step():
                    batch = feed.next()
                    train_step(
                        self.model,
                        self.optimizer,
                        batch.inputs,
                        batch.targets,
                        micro_batch_size=plan.micro_batch_size,
                        clip=plan.settings.optimizer.clip,
                        world_size=ranks.world_size,
                        counted=batch.counted,
                        documents=batch.documents,
                        guard=self.guard,
                        terms=terms,
                        stop=stop.poll,
                    )
                state = replace(
                    state,
                    step=state.step + 1,
                    samples=state.samples + plan.samples_per_step,
                    tokens=state.tokens + plan.tokens_per_step,
                )
                meter.stepped(feed.wait)
                state = self._with_saved(state, self.saver.poll())
                if profiler.profile:
                    self.emit(Profiled(state.step, profiler.profile))
                    profiler.profile = None  # told once
                is_last = state.step == steps
                save_due = state.step % plan.checkpoint_every == 0 or is_last
                eval_due = state.step % plan.eval_every == 0 or is_last
                sample_due = samples.due(state.step)
                log_due = state.step % plan.log_every == 0 or is_last
                pause_due = save_due or eval_due or sample_due
                if log_due or pause_due:
                    state = self.recovery.collect_outcomes(state)  # waits for the device
                    if self.recovery.rollback_reason:
                        continue
                if log_due:
                    self.emit(
                        meter.read(
                            state.step,
                            tokens=state.tokens,
                            loss=self.guard.last.loss,
                            gradient_norm=self.guard.last.gradient_norm,
                            learning_rate=rate,
                            sources=self._tokens_by_source(state),
                            others=terms.read(ranks) if terms else {},
                        )
                    )
                if eval_due:
                    with meter.held_up("evaluation"):
                        self.evaluate(state)
                if save_due:
                    with meter.held_up("save"):
                        state = self.save(state, keeps_training=not is_last)
                if sample_due and state.step < steps:
                    with meter.held_up("evaluation"):
                        samples.take(self.decoder, state.step, stop)
                stop.after(state.step)
            state = self.save(state, keeps_training=False)
            if samples.due(state.step):
                samples.take(self.decoder, state.step, stop)
            self.saver.finish()
        except Stopped:
            stopped = True
            self._leave(state, made=state.step - first)
        finally:
            profiler.close()
            feed.close()
            self.saver.close()
            self.outputs.close()
        finished = Finished(self.run, state.step, steps, "stopped" if stopped else "done")
        self.emit(finished)
        return finished

    def _leave(self, state: State, *, made: int) -> None:
        """Save a run that was asked to stop, after `made` steps."""
        self.save(state, keeps_training=False)
        self.saver.finish()
        if self.stop.reason:
            self.emit(Notice(f"{self.stop.reason}: stopped"))
        if self.stop.out_of_time and not made:
            raise ConfigError(
                f"{self.stop.reason} is too short: no step was done before the last "
                f"{self.stop.room:.0f} s, which are kept for a save; give more"
            )

    def _tokens_by_source(self, state: State) -> dict[str, int]:
        """Return the tokens seen of each dataset, if there are several."""
        sources = self.plan.data.trained_on
        counts = np.array(self.batches.interleaving.counts(state.samples))
        for borders in state.passed:
            before, after = map(self.batches.interleaving.counts, borders)
            counts += np.array(before) - np.array(after)
        tokens = (counts * self.plan.seq_len).tolist()
        names = [source.name for source in sources]
        return dict(zip(names, tokens, strict=True)) if len(self.plan.data.sources) > 1 else {}

    def roll_back(self, state: State) -> State:
        """Return to an earlier checkpoint and discard what came later."""
        self.saver.wait()  # it may be the one
        state, told = self.recovery.roll_back(state)
        self.saved_step, self.evaluated_step, self.evaluation = state.step, -1, None
        if self.ranks.is_first:
            for left in retention.abandon_later(self.run, state.step):
                self.emit(Notice(f"{left}: beyond step {state.step:,}, renamed to abandoned-…"))
            self.outputs.close()
            self.outputs.open(state)
        self.emit(told)
        return state

    def _missed_evaluation(self, state: State) -> bool:
        """Return whether the run was stopped at a step whose evaluation was still due."""
        last = state.step == self.plan.steps
        due = state.step > 0 and (last or state.step % self.plan.eval_every == 0)
        done = self.outputs.has_evaluated(state.step)
        return due and self.ranks.any(self.ranks.is_first and not done)

    def evaluate(self, state: State) -> None:
        """Measure and emit the validation loss, at most once per step."""
        if self.evaluated_step == state.step:
            return
        self.model.eval()
        self.evaluated_step = state.step
        evaluation = evaluate(
            self.model,
            self.plan.data,
            step=state.step,
            seq_len=self.plan.seq_len,
            batch_size=self.plan.micro_batch_size,
            ranks=self.ranks,
            document_mask=self.plan.settings.data.document_mask,
            check=self.stop.check,
        )
        if evaluation is not None:
            self.evaluation = evaluation
            self.emit(evaluation)

    def _with_best(self, state: State) -> State:
        """Return the state to save, marked as the best one if its validation loss is the lowest."""
        last = self.evaluation
        best = math.inf if state.best_loss is None else state.best_loss
        if last is not None and last.step == state.step and last.loss < best:
            return replace(state, best_step=last.step, best_loss=last.loss)
        return state

    def save(self, state: State, *, keeps_training: bool) -> State:
        """Start writing a checkpoint, at most once per step, after the previous one is written.
        `keeps_training` is whether training continues."""
        if self.saved_step == state.step:
            return state
        since = time.perf_counter()
        state = self.recovery.collect_outcomes(state)
        if not self.recovery.can_be_saved(state):
            return state
        state = self._with_saved(state, self.saver.wait())
        self.outputs.flush()
        whole = replace(self._with_best(state), guard=self.guard.state_dict())
        self.saver.begin(
            self.decoder, self.optimizer, whole, since=since, keeps_training=keeps_training
        )
        self.saved_step = state.step
        self.stop.paused()
        return self._with_saved(state, self.saver.poll())

    def _with_saved(self, state: State, saved: State | None) -> State:
        """Return the state, updated with the best checkpoint if a save has ended."""
        if saved is None:
            return state
        self.stop.saved(self.saver.seconds)
        return replace(state, best_step=saved.best_step, best_loss=saved.best_loss)
