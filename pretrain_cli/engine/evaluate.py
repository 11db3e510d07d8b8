"""The loss of the validation split: every token once, whatever the batch shape and the ranks."""

import math

import torch
from torch import nn

from pretrain_cli.data.batches import IGNORED, validation_batches
from pretrain_cli.data.shards import Dataset
from pretrain_cli.engine.distributed import Ranks, part_again
from pretrain_cli.engine.metrics import Evaluation


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, *, step: int, seq_len: int, batch_size: int, ranks: Ranks
) -> Evaluation:
    """Mean loss over all validation tokens, and bits per byte of their text."""
    total = torch.zeros(2, device=ranks.device, dtype=torch.float64)  # summed loss, targets
    for inputs, targets in validation_batches(
        dataset.tokens("val"),
        seq_len=seq_len,
        batch_size=batch_size,
        rank=ranks.rank,
        world=ranks.world,
    ):
        tokens = torch.from_numpy(inputs).to(ranks.device)
        wanted = torch.from_numpy(targets).to(ranks.device)
        loss = model(tokens, wanted, normalizer=1)
        total[0] += loss.double()
        total[1] += (wanted != IGNORED).sum()
    part_again(model)
    summed, count = ranks.sum(total).tolist()
    size = dataset.manifest.total("val", "bytes")
    return Evaluation(
        step=step,
        loss=summed / count,
        bits_per_byte=summed / math.log(2) / max(size, 1),
        tokens=int(count),
    )
