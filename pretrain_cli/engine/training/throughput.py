"""Measure a run: the loop reports what happens, and a line is read when one is due.

began ── step step step ── line ── evaluating ── step step ── saving ── step ── line
         └── interval ───┘                      └─ interval, what held it up left out ─┘
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Literal

from pretrain_cli.engine.runs.events import StepMetrics
from pretrain_cli.engine.runs.metrics_file import peak_memory
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.model.counting import Flops


class ThroughputMeter:
    """Times and rates of the steps since the last line, and of the run so far.

    Times are the host's. A GPU works behind it, so whoever reads a line or holds training up first
    waits for the device: the trainer does, for the loss.
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
        """From `tokens` seen on; `before` are tokens and seconds that earlier processes told of."""
        self.ranks, self.flops, self.peak = ranks, flops, peak * ranks.world_size
        self.tokens_per_step, self.first_tokens, self.before = tokens_per_step, tokens, before
        self.began = time.perf_counter()
        self._next_interval(self.began)

    def _next_interval(self, now: float) -> None:
        self.since, self.steps, self.waited = now, 0, 0.0
        self.held = {"save": 0.0, "evaluation": 0.0}

    def stepped(self, wait: float) -> None:
        """A step was taken that waited so long for its batch."""
        self.steps += 1
        self.waited += wait

    @contextlib.contextmanager
    def held_up(self, by: Literal["save", "evaluation"]) -> Iterator[None]:
        """Leave the time inside this block out of training."""
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
        """The line of this step; the next interval begins."""
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
