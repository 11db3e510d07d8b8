"""Handle skipped steps: record each, and roll back after too many.

… 100 saved … 146 taken │ 147 ✗ 148 ✗ 149 ✗ … 156 ✗     ten in a row
   └──────────────────── restore this checkpoint, continue with the samples after step 156
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain_cli.engine.planning.plan import Plan
from pretrain_cli.engine.runs import checkpoint, retention
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runs.events import Emit, Notice, RolledBack, Skipped
from pretrain_cli.engine.runtime.distributed import (
    Ranks,
    distribute_like,
    full_tensor,
    is_sharded,
    reshard,
)
from pretrain_cli.engine.runtime.speed import build_model
from pretrain_cli.engine.training.job import Job
from pretrain_cli.engine.training.prefetch import DeviceBatch
from pretrain_cli.engine.training.run_log import RunLog
from pretrain_cli.engine.training.step import add_gradients
from pretrain_cli.engine.training.step_guard import StepOutcome, is_finite
from pretrain_cli.errors import PretrainError
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.hf_weights import load_weights
from pretrain_cli.model.parameter_map import parameter_map


class Rollback:
    """Collects the outcomes of steps from the guard, and rolls the run back when too many were
    skipped."""

    def __init__(self, job: Job[Plan], log: RunLog) -> None:
        self.job, self.log, self.guard = job, log, job.guard
        self.reason = ""
        """Reason why the run must roll back before its next step; empty if it need not."""
        self.back_at = -1
        self._note_divergence("")

    def collect_outcomes(self, state: State, *, started: bool = False) -> State:
        """Read the outcomes of the steps up to this one and report the skipped ones. Waits for the
        device. If `started`, this is the step of the guard's last `start_read`."""
        verdicts = self.guard.read(started=started)
        steps = range(state.step - len(verdicts) + 1, state.step + 1)
        taken = [step for step, each in zip(steps, verdicts, strict=True) if not each.in_a_row]
        for step, verdict in zip(steps, verdicts, strict=True):
            if not 0 < verdict.in_a_row <= self.guard.max_skips:  # beyond, it was not judged
                continue
            first = state.samples - (state.step - step + 1) * self.job.plan.samples_per_step
            record = diagnose(
                verdict,
                step=step,
                samples=(first, first + self.job.plan.samples_per_step),
                same_weights=not any(later > step for later in taken)
                and not self.guard.took_unread(),
                rollbacks=state.rollbacks,
                job=self.job,
            )
            self.log.emit(record)
            self._note_divergence(verdict.reason)
        if not verdicts:
            return state
        skipped = state.skipped + len(verdicts) - len(taken)
        return replace(state, skipped=skipped, finite=state.step in taken)

    def _note_divergence(self, reason: str) -> None:
        if self.guard.is_exhausted:
            last = f", the last because its {reason}" if reason else ""
            self.reason = f"{self.guard.max_skips} steps in a row were skipped{last}"

    def can_be_saved(self, state: State) -> bool:
        """Return whether everything that a checkpoint would hold is finite. If not, sets
        `reason`."""
        if is_finite(self.job.optimizer, self.job.ranks):
            return True
        self.reason = "weights or the optimizer's moments are not finite"
        self.log.notify(f"Step {state.step:,} is not saved: {self.reason}")
        return False

    def roll_back(self, state: State) -> State:
        """Restore the last checkpoint known to be finite and continue behind the samples seen
        since. Renames later checkpoints and drops later lines of the run's files.

        Raises PretrainError if there is no such checkpoint, or after too many rollbacks. Call it
        only while no checkpoint is being written.
        """
        state = self.collect_outcomes(state)
        run, plan, ranks = self.log.run, self.job.plan, self.job.ranks
        limit = plan.settings.train.max_rollbacks
        in_a_row = self.guard.last.in_a_row
        first = state.step - in_a_row + 1
        if first - 1 == self.back_at:  # from where the run has gone back to, no step was taken
            first -= 1
        folder = last_finite_checkpoint(run, first, ranks, self.log.emit)
        if folder is None or state.rollbacks >= limit:
            why = f"{run} has no earlier checkpoint to go back to"
            if folder is not None:
                why = f"it went back {state.rollbacks} times, as train.max_rollbacks allows"
            raise PretrainError(
                f"step {state.step}: training diverged: {self.reason}, and {why}. "
                "Nothing of this is saved; metrics.jsonl describes the batches. Start again with a "
                f"lower --learning-rate, or with --init-from an earlier checkpoint of {run}"
            )
        # Steps after the guard had given up were not judged: their samples are still to come.
        unseen = max(0, in_a_row - self.guard.max_skips)
        samples = state.samples - unseen * self.job.plan.samples_per_step
        sound = restore(folder, self.job)
        passed = (sound.samples, samples)
        event = RolledBack(
            sound.step, state.step - unseen, self.reason, passed, state.rollbacks + 1
        )
        self.guard.load_state_dict(sound.guard)
        self.job.batches.go_to(samples)
        self.back_at, self.reason = sound.step, ""
        state = replace(
            sound, samples=samples, passed=(*sound.passed, passed), rollbacks=event.rollbacks
        )
        if ranks.is_first:
            abandon_later(run, state.step, self.log.emit)
            self.log.close()
            self.log.open(state)
        self.log.emit(event)
        return state


def abandon_later(run: Path, step: int, emit: Emit) -> None:
    """Rename the checkpoints beyond this step, and emit a notice of each."""
    for left in retention.abandon_later(run, step):
        emit(Notice(f"{left}: beyond step {step:,}, renamed to abandoned-…"))


def last_finite_checkpoint(run: Path, before: int, ranks: Ranks, emit: Emit) -> Path | None:
    """Return the newest checkpoint below a step that is intact and known to be finite. The first
    rank searches; every rank gets its result."""
    step = -1
    if ranks.is_first:
        for folder in retention.checkpoints(run):
            if retention.step_of(folder) >= before:
                continue
            if reason := checkpoint.find_damage(folder):
                emit(Notice(f"{reason}; skipped"))
            elif checkpoint.read_state(folder).finite:
                step = retention.step_of(folder)
                break
    step = int(ranks.sum(torch.tensor(step if ranks.is_first else 0, device=ranks.device)).item())
    found = (folder for folder in retention.checkpoints(run) if retention.step_of(folder) == step)
    return next(found, None)


def restore(folder: Path, job: Job[Plan]) -> State:
    """Load a checkpoint's weights, optimizer state and random state into a model in training."""
    if is_sharded(job.decoder):
        full_model = build_model(job.plan.model, job.plan.speed, torch.device("cpu"))
        load_weights(full_model, folder)
        shards = dict(job.decoder.named_parameters())
        with torch.no_grad():
            for name, value in full_model.named_parameters():
                shards[name].copy_(distribute_like(value, shards[name]))
    else:
        load_weights(job.decoder, folder)
    return checkpoint.load_training_state(folder, job.decoder, job.optimizer)


WORST_SAMPLES = 3
WORST_TENSORS = 5
TEXT_CHARACTERS = 200
"""Number of characters of a sample's text that are recorded."""


def diagnose(
    verdict: StepOutcome,
    *,
    step: int,
    samples: tuple[int, int],
    same_weights: bool,
    rollbacks: int,
    job: Job[Plan],
) -> Skipped:
    """Run the samples of a skipped step again: forward one by one, then forward and backward
    together.

    Every rank must call this. `same_weights` is whether the weights have not changed since that
    step.
    """
    batch = job.batches.at(samples[0])
    losses = _sample_losses(job.model, batch, job.ranks).tolist()
    add_gradients(job, batch)
    norms = _gradient_norms(job.decoder)
    job.decoder.zero_grad(set_to_none=True)
    return Skipped(
        step=step,
        reason=verdict.reason,
        loss=verdict.loss,
        gradient_norm=verdict.gradient_norm,
        samples=samples,
        worst_samples=[
            _sample(samples[0] + place, losses[place], job)
            for place in _worst(dict(enumerate(losses)), WORST_SAMPLES)
        ],
        worst_gradients={name: norms[name] for name in _worst(norms, WORST_TENSORS)},
        same_weights=same_weights,
        rollbacks=rollbacks,
    )


@torch.no_grad()
def _sample_losses(model: nn.Module, batch: DeviceBatch, ranks: Ranks) -> Tensor:
    """Return the loss of each sample of the step, from all ranks. -> (samples,)"""
    rows = len(batch.inputs)
    losses = torch.zeros(rows * ranks.world_size, device=ranks.device)
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # one sample is a shape of its own
        for row in range(rows):
            one = batch[row : row + 1]
            parts = model(one.inputs, one.targets, documents=one.documents)
            losses[ranks.rank * rows + row] = parts.cross_entropy
    reshard(model)
    return ranks.sum(losses)


def _gradient_norms(decoder: Decoder) -> dict[str, float]:
    """Return the gradient norm of every tensor, by its published name."""
    parameters, norms = dict(decoder.named_parameters()), {}
    gathered: tuple[str, Tensor | None] = "", None
    for piece in parameter_map(decoder.config, merged=decoder.merged):
        if piece.parameter != gathered[0]:
            grad = parameters[piece.parameter].grad
            gathered = piece.parameter, None if grad is None else full_tensor(grad).cpu()
        if gathered[1] is not None:
            norm = torch.linalg.vector_norm(piece.of(gathered[1]), dtype=torch.float64)
            norms[piece.name] = norm.item()
    return norms


def _worst(numbers: dict[Any, float], count: int) -> list[Any]:
    """Return the keys of the numbers that are not finite, followed by those of the largest."""
    return sorted(numbers, key=lambda name: _size(numbers[name]), reverse=True)[:count]


def _size(number: float) -> float:
    return number if math.isfinite(number) else math.inf


def _sample(number: int, loss: float, job: Job[Plan]) -> dict[str, Any]:
    source, tokens = job.batches.tokens_of(number)
    plan = job.plan
    return {
        "sample": number,
        "source": plan.data.trained_on[source].name,
        "loss": loss,
        "text": plan.data.tokenizer.decode(tokens.tolist())[:TEXT_CHARACTERS],
    }
