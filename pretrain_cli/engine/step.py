"""One optimizer step, as `train` takes it and `benchmark` times it."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pretrain_cli.engine.distributed import gradients_kept


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    micro_batch_size: int,
    clip: float,
    world: int = 1,
    counted: int | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step on this rank's share of its samples. -> (loss, gradient norm).

    inputs and targets (B, T) are taken `micro_batch_size` rows at a time, and with them `documents`
    (B, T), where attention is kept inside each. Each part's loss is its sum over a rank's part of
    the targets that count in the whole step, by default all, so the parts add up to the mean that
    one large batch would give; gradients are then averaged over the ranks. The loss returned is
    this rank's part of the mean over all ranks.
    """
    normalizer = targets.numel() if counted is None else counted / world
    model.train()
    total = torch.zeros((), device=inputs.device)
    for start in range(0, len(inputs), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        with gradients_kept(model, last=rows.stop >= len(inputs)):
            loss = model(
                inputs[rows],
                targets[rows],
                documents=None if documents is None else documents[rows],
                normalizer=normalizer,
            )
            loss.backward()
        total += loss.detach() / world
    limit = clip if clip > 0 else float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm
