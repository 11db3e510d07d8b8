"""Throughput: times of steps between two log lines, and totals of the run.

began ── step step step ── line ── evaluating ── step step ── saving ── step ── line
         └── interval ───┘                      └─ interval, without what held it up ─┘
"""

import contextlib
import time
from collections.abc import Generator
from typing import Any, Literal

from pretrain_cli.engine.runs.events import StepMetrics
from pretrain_cli.engine.runs.metrics_file import peak_memory
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.model.counting import Flops


class ThroughputMeter:
    """Times and rates of the steps since the last log line, and of the run so far.

    Times are the host's, and a GPU runs behind the host. Callers therefore synchronize with the
    device before `read` and `held_up`; the training loop does so by reading the loss.
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
            sources=sources,
            **others,
        )
        self._next_interval(now)
        return line
