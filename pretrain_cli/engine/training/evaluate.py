"""Validation loss: every token of the validation splits counts once, for any batch size and any
number of ranks."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from pretrain_cli.data.batches import document_numbers, validation_batches
from pretrain_cli.data.dataset import Dataset, Split
from pretrain_cli.data.mixture import Mixture
from pretrain_cli.engine.planning.plan import Plan
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runs.events import Evaluation, Validation
from pretrain_cli.engine.runtime.distributed import Ranks, reshard
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.engine.runtime.transfer import documents_to_device, to_device
from pretrain_cli.engine.training.job import Job
from pretrain_cli.engine.training.run_log import RunLog
from pretrain_cli.targets import IGNORE_INDEX


class Evaluator:
    """Evaluates a run in progress when it is due, at most once per step."""

    def __init__(self, job: Job[Plan], log: RunLog, stop: StopRequest) -> None:
        self.job, self.log, self.stop = job, log, stop
        self.step = -1
        """Step of the last evaluation."""
        self.result: Evaluation | None = None
        """Its result; None without a validation split."""

    def due(self, step: int) -> bool:
        """Return whether an evaluation is due at this step. It always is at the last step."""
        return step == self.job.plan.steps or step % self.job.plan.eval_every == 0

    def was_missed(self, step: int) -> bool:
        """Return whether the run was stopped at a step whose evaluation was still due. Every rank
        must call it."""
        missed = step > 0 and self.due(step) and not self.log.has_evaluated(step)
        return self.job.ranks.any(self.job.ranks.is_first and missed)

    def take(self, step: int) -> None:
        """Measure and emit the validation loss. Every rank must call it. Raises Stopped if
        requested."""
        if self.step == step:
            return
        job, self.step = self.job, step
        job.model.eval()
        self.result = evaluate(
            job.model,
            job.plan.data,
            step=step,
            seq_len=job.plan.seq_len,
            batch_size=job.plan.micro_batch_size,
            ranks=job.ranks,
            document_mask=job.plan.settings.data.document_mask,
            check=self.stop.check,
        )
        if self.result is not None:
            self.log.emit(self.result)

    def mark_best(self, state: State) -> State:
        """Return the state, marked as the best one if its validation loss is the lowest."""
        result = self.result
        best = math.inf if state.best_loss is None else state.best_loss
        if result is not None and result.step == state.step and result.loss < best:
            return replace(state, best_step=result.step, best_loss=result.loss)
        return state

    def rolled_back(self) -> None:
        """Forget the last evaluation, which belongs to steps that will run again."""
        self.step, self.result = -1, None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Mixture,
    *,
    step: int,
    seq_len: int,
    batch_size: int,
    ranks: Ranks,
    document_mask: bool = False,
    check: Callable[[], object] = lambda: None,
) -> Evaluation | None:
    """Return mean loss over all validation tokens, perplexity, and bits per byte of text.

    With several datasets, the result has these for each dataset as well. Returns None if no dataset
    has a validation split. All ranks call `check` before every batch; an exception it raises ends
    the evaluation.
    """
    sources = [source for source in data.sources if len(source.dataset.val.tokens) > 1]
    if not sources:
        return None
    began = time.perf_counter()
    shape = {"seq_len": seq_len, "batch_size": batch_size}
    try:
        sums = torch.stack(  # (sources, 2)
            [
                _summed(model, source.dataset, ranks, document_mask, check, **shape)
                for source in sources
            ]
        )
    finally:
        reshard(model)
    if ranks.world_size > 1:
        sums = ranks.sum(sums.to(ranks.device))
    splits = [source.dataset.val for source in sources]
    each = {
        source.name: _mean(row, [split])
        for source, row, split in zip(sources, sums, splits, strict=True)
    }
    return Evaluation(
        **asdict(_mean(sums.sum(0), splits)),
        step=step,
        time=time.time(),
        evaluation_time=time.perf_counter() - began,
        sources=each if len(data.sources) > 1 else {},
    )


def _summed(
    model: nn.Module,
    dataset: Dataset,
    ranks: Ranks,
    document_mask: bool,
    check: Callable[[], object],
    **shape: int,
) -> Tensor:
    """Return the sum of this rank's losses on a dataset and the number of its targets. -> (2,)

    Waits for the device once, after the last batch.
    """
    losses, counted, total = [], 0, 0.0
    for inputs, targets in validation_batches(
        dataset.val.tokens, rank=ranks.rank, world_size=ranks.world_size, **shape
    ):
        check()
        documents = None
        if document_mask:
            numbers = document_numbers(inputs, dataset.separator, leads=dataset.separator_leads)
            documents = documents_to_device(numbers, ranks.device)
        parts = model(
            to_device(inputs, ranks.device),
            to_device(targets, ranks.device),
            documents=documents,
            normalizer=1,
        )
        losses.append(parts.cross_entropy)
        counted += int((targets != IGNORE_INDEX).sum())
    for loss in torch.stack(losses).tolist():  # in float64, which not every device has
        total += loss
    return torch.tensor([total, counted], dtype=torch.float64)


def _mean(sums: Tensor, splits: list[Split]) -> Validation:
    summed, count = sums.tolist()
    loss = summed / count
    return Validation(
        loss=loss,
        perplexity=torch.tensor(loss, dtype=torch.float64).exp().item(),  # inf, not an error
        bits_per_byte=summed / math.log(2) / max(sum(split.bytes for split in splits), 1),
        tokens=int(count),
        split_tokens=sum(len(split.tokens) - 1 + split.left_out for split in splits),
    )
