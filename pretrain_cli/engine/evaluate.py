"""The loss of the validation split: every token once, whatever the batch shape and the ranks."""

import math

import torch
from torch import nn

from pretrain_cli.data.batches import IGNORED, validation_batches
from pretrain_cli.data.dataset import Dataset
from pretrain_cli.engine.distributed import Ranks, part_again
from pretrain_cli.engine.documents import documents_of
from pretrain_cli.engine.metrics import Evaluation


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    *,
    step: int,
    seq_len: int,
    batch_size: int,
    ranks: Ranks,
    document_mask: bool = False,
) -> Evaluation:
    """Mean loss over all validation tokens, and bits per byte of their text."""
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, targets; not every device has it
    for inputs, targets in validation_batches(
        dataset.val.tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        rank=ranks.rank,
        world=ranks.world,
    ):
        tokens = torch.from_numpy(inputs).to(ranks.device)
        wanted = torch.from_numpy(targets).to(ranks.device)
        documents = documents_of(tokens, dataset) if document_mask else None
        total[0] += model(tokens, wanted, documents=documents, normalizer=1).item()
        total[1] += int((targets != IGNORED).sum())
    part_again(model)
    if ranks.world > 1:
        total = ranks.sum(total.to(ranks.device))
    summed, count = total.tolist()
    size = dataset.val.bytes
    return Evaluation(
        step=step,
        loss=summed / count,
        bits_per_byte=summed / math.log(2) / max(size, 1),
        tokens=int(count),
    )
