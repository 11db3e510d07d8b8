"""Metrics of logged steps: throughput between two log lines, and totals of the run.

began ── step step step ── line ── evaluating ── step step ── saving ── step ── line
         └── interval ───┘                      └─ interval, without what held it up ─┘

On a GPU the numbers of a step are read while the next step runs.
"""

import contextlib
import time
from collections.abc import Callable, Generator
from typing import Any, Literal

import numpy as np

from pretrain_cli.engine.planning.plan import Plan
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runs.events import StepMetrics
from pretrain_cli.engine.runs.metrics_file import peak_memory, peak_reserved_memory
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.transfer import runs_behind
from pretrain_cli.engine.training.auxiliary_losses import AuxiliaryLosses
from pretrain_cli.engine.training.job import Job
from pretrain_cli.engine.training.rollback import Rollback
from pretrain_cli.engine.training.run_log import RunLog
from pretrain_cli.model import counting
from pretrain_cli.model.counting import Flops


class StepReport:
    """Emits the metrics of logged steps, and collects the outcomes of the steps up to them.

        GPU   ── step 10 ──── step 11 ──── step 12 ──
        host  begin(10), launch 11, finish(10)

    A GPU has the next step queued while the host reads, so it never waits for the host. On other
    devices `begin` reads at once. Every rank must call the methods.
    """

    def __init__(self, job: Job[Plan], log: RunLog, rollback: Rollback) -> None:
        self.job, self.log, self.rollback = job, log, rollback
        self.meter = ThroughputMeter(
            job.ranks,
            flops=counting.training_flops(job.plan.model, job.plan.seq_len),
            peak=job.peak.flops,
            tokens_per_step=job.plan.tokens_per_step,
            tokens=job.state.tokens,
            before=log.before,
        )
        self.begun: tuple[float, Callable[[], dict[str, Any]] | None] | None = None
        """Learning rate and auxiliary losses of the step that was begun."""

    def begin(self, state: State, rate: float, auxiliary: AuxiliaryLosses | None) -> State:
        """Start reading the numbers of this step."""
        if self.rollback.reason:  # the step will run again
            return state
        self.job.guard.start_read()
        self.begun = rate, auxiliary.start_read(self.job.ranks) if auxiliary else None
        return state if runs_behind(self.job.ranks.device) else self.finish(state)

    def finish(self, state: State) -> State:
        """Emit the metrics of this step if it was begun; not if the run must roll back. Waits until
        the device has run it."""
        if self.begun is None:
            return state
        (rate, auxiliary), self.begun = self.begun, None
        state = self.rollback.collect_outcomes(state, started=True)
        if not self.rollback.reason:
            self.meter.flops = self._flops(state)
            metrics = self.meter.read(
                state.step,
                tokens=state.tokens,
                loss=self.job.guard.last.loss,
                gradient_norm=self.job.guard.last.gradient_norm,
                learning_rate=rate,
                sources=_tokens_by_source(self.job, state),
                others=auxiliary() if auxiliary else {},
            )
            self.log.emit(metrics)
        return state

    def _flops(self, state: State) -> Flops:
        """Return the operations per token of the step just taken, whose samples may be longer than
        those of earlier stages."""
        plan = self.job.plan
        return counting.training_flops(
            plan.model, plan.seq_len_at(state.samples - plan.samples_per_step)
        )

    def flush(self, state: State) -> State:
        """Finish this step if it was begun, and collect the outcomes of all steps. Waits for the
        device."""
        return self.rollback.collect_outcomes(self.finish(state))


def _tokens_by_source(job: Job[Plan], state: State) -> dict[str, int]:
    """Return the tokens seen of each dataset, if there are several."""
    data = job.plan.data
    if len(data.sources) == 1:
        return {}
    counts = np.array(job.batches.counts(state.samples))
    for skipped in state.passed:
        before, after = map(job.batches.counts, skipped)
        counts += np.array(before) - np.array(after)
    tokens = (counts * job.plan.seq_len).tolist()
    return dict(zip([source.name for source in data.trained_on], tokens, strict=True))


class ThroughputMeter:
    """Times and rates of the steps since the last log line, and of the run so far.

    Times are the host's, and a GPU runs behind the host. Callers therefore wait until the device
    has run the step before `read` and `held_up`; StepReport does so by reading the loss.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        flops: Flops,
        peak: float,
        tokens_per_step: int,
        tokens: int,
        before: tuple[int, float],
    ) -> None:
        """Start at `tokens`; `before` holds tokens and seconds of the run's earlier processes."""
        self.ranks, self.flops, self.peak = ranks, flops, peak * ranks.world_size
        self.tokens_per_step, self.first_tokens, self.before = tokens_per_step, tokens, before
        self.began = time.perf_counter()
        self._next_interval(self.began)

    def _next_interval(self, now: float) -> None:
        self.since, self.steps, self.waited = now, 0, 0.0
        self.held = {"save": 0.0, "evaluation": 0.0}

    def stepped(self, wait: float) -> None:
        """Count a step, and the seconds it waited for its batch."""
        self.steps += 1
        self.waited += wait

    @contextlib.contextmanager
    def held_up(self, by: Literal["save", "evaluation"]) -> Generator[None]:
        """Exclude the time inside this context from training time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.held[by] += time.perf_counter() - began

    def read(
        self,
        step: int,
        *,
        tokens: int,
        loss: float,
        gradient_norm: float,
        learning_rate: float,
        sources: dict[str, int],
        others: dict[str, Any],
    ) -> StepMetrics:
        """Return the metrics of this step and start the next interval."""
        now = time.perf_counter()
        training = now - self.since - sum(self.held.values())
        speed = self.steps * self.tokens_per_step / training
        tokens_before, seconds_before = self.before
        seconds = seconds_before + now - self.began
        line = StepMetrics(
            step=step,
            time=time.time(),
            seconds=seconds,
            loss=loss,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            tokens=tokens,
            tokens_per_second=speed,
            run_tokens_per_second=(tokens_before + tokens - self.first_tokens) / seconds,
            mfu=speed * self.flops.exact / self.peak,
            mfu_conventional=speed * self.flops.conventional / self.peak,
            data_wait=self.waited / self.steps,
            save_stall=self.held["save"],
            evaluation_time=self.held["evaluation"],
            memory=peak_memory(self.ranks.device),
            memory_reserved=peak_reserved_memory(self.ranks.device),
            sources=sources,
            **others,
        )
        self._next_interval(now)
        return line
