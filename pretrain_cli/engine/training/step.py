"""One optimizer step, as `train` takes it and `benchmark` times it."""

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
    """One optimizer step on this rank's share of its samples. -> (loss, gradient norm).

    The loss returned is this rank's part of the mean over all ranks. What is minimized beside it is
    said by `terms`, and added up there. A guard decides whether the step is taken; without one it
    is. Raises Stopped between two micro-steps where `stop` says so: the step is then as if it had
    not begun.
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
    """The gradients of a step, and this rank's part of its loss.

    inputs and targets (B, T) are taken `micro_batch_size` rows at a time, and with them `documents`
    (B, T), where attention is kept inside each. Each part's loss is its sum over a rank's part of
    the targets that count in the whole step, by default all, so the parts add up to the mean that
    one large batch would give; gradients are then averaged over the ranks. Raises Stopped between
    two micro-steps where `stop` says so; there are then no gradients.
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
