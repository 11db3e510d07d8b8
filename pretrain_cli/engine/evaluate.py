"""The loss of the validation splits: every token once, whatever the batch shape and the ranks."""

import math

import torch
from torch import Tensor, nn

from pretrain_cli.data.batches import IGNORED, validation_batches
from pretrain_cli.data.dataset import Dataset
from pretrain_cli.data.documents import document_numbers
from pretrain_cli.data.mixture import Mixture
from pretrain_cli.engine.distributed import Ranks, part_again
from pretrain_cli.engine.metrics import Evaluation, Validation


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
) -> Evaluation | None:
    """Mean loss over all validation tokens, and bits per byte of their text; where there are
    several datasets, of each as well. None where no dataset has anything to validate on."""
    sources = [source for source in data.sources if len(source.dataset.val.tokens) > 1]
    if not sources:
        return None
    shape = {"seq_len": seq_len, "batch_size": batch_size}
    sums = torch.stack(  # (sources, 2)
        [_summed(model, source.dataset, ranks, document_mask, **shape) for source in sources]
    )
    part_again(model)
    if ranks.world > 1:
        sums = ranks.sum(sums.to(ranks.device))
    sizes = [source.dataset.val.bytes for source in sources]
    total = _mean(sums.sum(0), sum(sizes))
    each = {
        source.name: _mean(row, size)
        for source, row, size in zip(sources, sums, sizes, strict=True)
    }
    return Evaluation(
        step=step,
        loss=total.loss,
        bits_per_byte=total.bits_per_byte,
        tokens=total.tokens,
        sources=each if len(data.sources) > 1 else {},
    )


def _summed(
    model: nn.Module, dataset: Dataset, ranks: Ranks, document_mask: bool, **shape: int
) -> Tensor:
    """This rank's part of a dataset: its loss, summed, and the count of its targets. -> (2,)"""
    total = torch.zeros(2, dtype=torch.float64)  # not every device has it
    for inputs, targets in validation_batches(
        dataset.val.tokens, rank=ranks.rank, world=ranks.world, **shape
    ):
        documents = None
        if document_mask:
            numbers = document_numbers(inputs, dataset.separator, leads=dataset.separator_leads)
            documents = torch.from_numpy(numbers).to(ranks.device)
        total[0] += model(
            torch.from_numpy(inputs).to(ranks.device),
            torch.from_numpy(targets).to(ranks.device),
            documents=documents,
            normalizer=1,
        ).item()
        total[1] += int((targets != IGNORED).sum())
    return total


def _mean(sums: Tensor, size: int) -> Validation:
    summed, count = sums.tolist()
    return Validation(
        loss=summed / count,
        bits_per_byte=summed / math.log(2) / max(size, 1),
        tokens=int(count),
    )
