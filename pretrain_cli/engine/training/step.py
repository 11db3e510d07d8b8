"""One optimizer step: `train` runs it and `benchmark` times it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pretrain_cli.engine.runtime.distributed import sync_gradients
from pretrain_cli.engine.runtime.stop import Stopped
from pretrain_cli.engine.training.auxiliary_losses import AuxiliaryLosses
from pretrain_cli.engine.training.step_guard import StepGuard
from pretrain_cli.spans import span


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    micro_batch_size: int,
    clip: float,
    world_size: int = 1,
    counted: int | None = None,
    documents: Tensor | None = None,
    guard: StepGuard | None = None,
    terms: AuxiliaryLosses | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step on this rank's share of the samples. -> (loss, gradient norm).

    The returned loss is this rank's part of the mean over all ranks. `terms` names the auxiliary
    losses that are minimized too, and collects them. With a guard, the guard decides whether the
    optimizer steps. Raises Stopped between two micro-steps if `stop` requests it; weights and
    optimizer are then unchanged.
    """
    total = add_gradients(
        model,
        inputs,
        targets,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        counted=counted,
        documents=documents,
        terms=terms,
        stop=stop,
    )
    with span("optimizer"):
        limit = clip if clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        if guard is None:
            optimizer.step()
        else:
            guard.step(optimizer, total, norm)
        optimizer.zero_grad(set_to_none=True)
    return total, norm


def add_gradients(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    micro_batch_size: int,
    world_size: int = 1,
    counted: int | None = None,
    documents: Tensor | None = None,
    terms: AuxiliaryLosses | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Accumulate the gradients of a step; return this rank's part of its loss.

    inputs and targets (B, T) are processed `micro_batch_size` rows at a time, together with
    `documents` (B, T) if attention stays inside documents. The loss of a micro-step is its sum
    divided by this rank's share of the counted targets of the whole step (by default all targets),
    so that the micro-steps add up to the mean of one large batch. Gradients are then averaged over
    the ranks. Raises Stopped between two micro-steps if `stop` requests it, leaving no gradients.
    """
    normalizer = targets.numel() if counted is None else counted / world_size
    model.train()
    total = torch.zeros((), device=inputs.device)
    for start in range(0, len(inputs), micro_batch_size):
        if start and stop():
            model.zero_grad(set_to_none=True)
            raise Stopped
        rows = slice(start, start + micro_batch_size)
        with sync_gradients(model, last=rows.stop >= len(inputs)):
            with span("forward"):
                found = model(
                    inputs[rows],
                    targets[rows],
                    documents=None if documents is None else documents[rows],
                    normalizer=normalizer,
                    coefficients=terms.coefficients if terms else None,
                )
            with span("backward"):
                (found.minimized if terms else found).backward()
        if terms:
            terms.add(found)
        total += (found.cross_entropy if terms else found.detach()) / world_size
    return total
