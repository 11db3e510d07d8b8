"""Set-up: build everything that training steps need, once and complete.

    plan ──> process settings → model → weights → compile → ranks → optimizer → state ──> Job

`train`, `lr_find` and `benchmark` build their steps here, so that what is timed is what is trained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from pretrain_cli.engine.optim.optimizer import build_optimizer
from pretrain_cli.engine.planning.plan import StepPlan
from pretrain_cli.engine.planning.vocabulary import new_vocabulary
from pretrain_cli.engine.runs import checkpoint
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runs.events import Emit, Notice, ignore
from pretrain_cli.engine.runtime.distributed import Ranks, parallelize
from pretrain_cli.engine.runtime.peak_flops import Peak, find_peak
from pretrain_cli.engine.runtime.process_settings import set_compile_cache
from pretrain_cli.engine.runtime.speed import apply_process_settings, build_model, compile_blocks
from pretrain_cli.engine.training.prefetch import DeviceBatch
from pretrain_cli.engine.training.step_guard import StepGuard
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.hf_weights import load_weights, say_left_out

PlanT = TypeVar("PlanT", bound=StepPlan, covariant=True)


class BatchSource(Protocol):
    """Batches of a run's steps, on the device, in order."""

    wait: float
    """Seconds that the last batch kept training waiting."""

    def next(self) -> DeviceBatch:
        """Return this rank's share of the next step."""
        ...

    def at(self, sample: int) -> DeviceBatch:
        """Return this rank's share of the step that starts at this sample, without moving."""
        ...

    def go_to(self, sample: int) -> None:
        """Continue with the step that starts at this sample."""
        ...

    def tokens_of(self, sample: int) -> tuple[int, np.ndarray]:
        """Return one sample, of any rank: the number of its source, and its inputs (T,)."""
        ...

    def counts(self, sample: int) -> list[int]:
        """Return how many of the samples before this one come from each source."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Job(Generic[PlanT]):
    """Everything that training steps need. `set_up` builds it; nothing is assigned to it later."""

    plan: PlanT
    ranks: Ranks
    decoder: Decoder
    model: nn.Module
    """The decoder, wrapped for parallel training if there are several ranks."""
    optimizer: Optimizer
    guard: StepGuard
    batches: BatchSource
    state: State
    """Position at which the steps start."""
    peak: Peak
    """Peak FLOP/s of the device; unknown, 0, unless it was to be measured."""


def set_up(
    plan: PlanT,
    ranks: Ranks,
    batches: BatchSource,
    *,
    start: Path | None = None,
    compile_cache: Path | None = None,
    peak_seconds: float = 0.0,
    emit: Emit = ignore,
) -> Job[PlanT]:
    """Build a job that starts from the checkpoint `start`, from --init-from, or from the seed.
    Every rank must call it.

    Changes settings of the whole process. `compile_cache` is the folder for compiled code; None
    leaves the process's own. `peak_seconds` are spent on measuring the peak FLOP/s.
    """
    settings = plan.settings
    apply_process_settings(plan.speed)
    torch.manual_seed(settings.train.seed)  # nothing draws from it yet; a checkpoint keeps it
    if plan.speed.compile and compile_cache:
        set_compile_cache(compile_cache)
    # Before the model, so that its memory counts in the peak of memory, and this does not.
    peak = Peak(0.0, "not measured", 0.0)
    if peak_seconds:
        peak = find_peak(ranks.device, plan.speed.compute_dtype, seconds=peak_seconds)
    decoder = set_up_model(plan, ranks.device, start=start, emit=emit)
    model = parallelize(decoder, ranks, settings.train.parallel)
    optimizer = build_optimizer(
        decoder, plan.recipe, fused=plan.speed.fused_optimizer, dtype=plan.speed.compute_dtype
    )
    state = checkpoint.load_training_state(start, decoder, optimizer) if start else State()
    guard = StepGuard(
        ranks, skip_spikes=settings.train.skip_spikes, max_skips=settings.train.max_skips
    )
    guard.load_state_dict(state.guard)
    batches.go_to(state.samples)
    return Job(
        plan=plan,
        ranks=ranks,
        decoder=decoder,
        model=model,
        optimizer=optimizer,
        guard=guard,
        batches=batches,
        state=state,
        peak=peak,
    )


def set_up_model(
    plan: StepPlan, device: torch.device, *, start: Path | None = None, emit: Emit = ignore
) -> Decoder:
    """Return the compiled model with its weights: those of the checkpoint `start`, of --init-from,
    or initialized from the seed. Call it after `apply_process_settings`."""
    decoder = build_model(plan.model, plan.speed, device)
    seed, init_from = plan.settings.train.seed, plan.settings.model.init_from
    folder = start or init_from
    vocabulary = None
    if start is None and init_from is not None and plan.tokenizer is not None:
        vocabulary = new_vocabulary(init_from, plan.tokenizer, seed)
    if folder is None:
        decoder.initialize(seed, how=plan.settings.model.initialization)
    elif left_out := load_weights(decoder, folder, vocabulary):
        emit(Notice(say_left_out(folder, left_out)))
    compile_blocks(decoder, plan.speed)
    return decoder
