"""One optimizer step: `train` takes it, `lr_find` tries rates with it, `benchmark` times it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain_cli.engine.optim.optimizer import set_rates
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.engine.planning.plan import StepPlan
from pretrain_cli.engine.runtime.distributed import sync_gradients
from pretrain_cli.engine.runtime.stop import Stopped
from pretrain_cli.engine.training.auxiliary_losses import AuxiliaryLosses
from pretrain_cli.engine.training.job import Job
from pretrain_cli.engine.training.prefetch import DeviceBatch
from pretrain_cli.model.loss import unit_gradient
from pretrain_cli.spans import span


class StepResult(NamedTuple):
    """Result of one step, on the device."""

    loss: Tensor
    """This rank's part of the mean cross-entropy over all ranks."""
    gradient_norm: Tensor
    """Norm of the full gradient, before clipping."""
    auxiliary: AuxiliaryLosses | None
    """Auxiliary losses; None if the plan has no weights for them."""


def train_step(
    job: Job[StepPlan],
    batch: DeviceBatch,
    rates: StepRates,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Take one optimizer step on this rank's share of the samples. Every rank must call it.

    The guard decides whether the optimizer steps. Raises Stopped between two micro-steps if `stop`
    requests it; weights and optimizer are then unchanged.
    """
    set_rates(job.optimizer, rates)
    loss, auxiliary = add_gradients(job, batch, stop=stop)
    with span("optimizer"):
        clip = job.plan.settings.optimizer.clip
        limit = clip if clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(job.model.parameters(), limit)
        job.guard.step(job.optimizer, loss, norm)
        job.optimizer.zero_grad(set_to_none=not job.plan.speed.cuda_graphs)
    return StepResult(loss, norm, auxiliary)


def add_gradients(
    job: Job[StepPlan], batch: DeviceBatch, *, stop: Callable[[], bool] = lambda: False
) -> tuple[Tensor, AuxiliaryLosses | None]:
    """Accumulate the gradients of a step. -> (this rank's part of the loss, auxiliary losses).

    The batch is processed `micro_batch_size` rows at a time. The loss of a micro-step is its sum
    divided by this rank's share of the counted targets of the whole step, so that the micro-steps
    add up to the mean of one large batch. Gradients are then averaged over the ranks. Raises
    Stopped between two micro-steps if `stop` requests it, leaving no gradients.
    """
    model, world_size, weights = job.model, job.ranks.world_size, job.plan.loss_weights
    auxiliary = AuxiliaryLosses(weights) if weights else None
    normalizer = batch.counted / world_size
    model.train()
    if job.plan.speed.cuda_graphs:
        _allocate_gradients(model)
    total = torch.zeros((), device=batch.inputs.device)
    at_once = job.plan.rows_at_once(batch.inputs.shape[1])
    for start in range(0, len(batch.inputs), at_once):
        if start and stop():
            model.zero_grad(set_to_none=True)
            raise Stopped
        rows = slice(start, start + at_once)
        with sync_gradients(model, last=rows.stop >= len(batch.inputs)):
            with span("forward"):
                parts = model(
                    batch.inputs[rows],
                    batch.targets[rows],
                    documents=None if batch.documents is None else batch.documents[rows],
                    normalizer=normalizer,
                    loss_weights=weights,
                )
            with span("backward"):
                parts.minimized.backward(unit_gradient(parts.minimized.device))
        if auxiliary:
            auxiliary.add(parts)
        total += parts.cross_entropy / world_size
    return total, auxiliary


def _allocate_gradients(model: nn.Module) -> None:
    """Give each parameter without a gradient one of zeros. Autograd adds to it; otherwise it would
    keep the output of a CUDA graph, which the next replay overwrites."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
