"""The prefetcher: order of batches, with and without reading ahead, and the measured wait."""

import time

import numpy as np
import pytest
import torch

from pretrain_cli.data.batches import Batch
from pretrain_cli.engine.training.prefetch import Prefetcher


class Numbered:
    """Batches filled with the number of their first sample; reading one takes `seconds`."""

    samples_per_step = 4

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def starting_at(self, sample: int) -> Batch:
        time.sleep(self.seconds)
        inputs = np.full((4, 3), sample)
        return Batch(inputs, inputs + 1, documents=inputs + 2, counted=sample)


@pytest.mark.parametrize("prefetch", [True, False])
def test_batches_come_in_order_from_the_first_sample(prefetch):
    feed = Prefetcher(Numbered(), device=torch.device("cpu"), prefetch=prefetch)
    feed.go_to(40)
    for first in (40, 44, 48, 52):
        batch = feed.next()
        assert batch.inputs.tolist() == [[first] * 3] * 4
        assert batch.targets.tolist() == [[first + 1] * 3] * 4
        assert batch.documents is not None
        assert batch.documents.counts == (1,) * 4
        assert batch.documents.numbers.tolist() == [[first + 2] * 3] * 4
        assert batch.counted == first
    feed.close()


def test_prefetching_hides_the_reading_time():
    """Reading a batch takes 0.1 s, and a training step 0.3 s."""
    waits = {}
    for prefetch in (True, False):
        feed = Prefetcher(Numbered(0.1), device=torch.device("cpu"), prefetch=prefetch)
        feed.next()
        time.sleep(0.3)
        feed.next()
        waits[prefetch] = feed.wait
        feed.close()
    assert waits[False] >= 0.1
    assert waits[True] < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [True, False])
def test_batches_reach_a_busy_gpu_whole(prefetch):
    """Each batch is read by kernels that run long after the host has asked for the next ones."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    feed, sums = Prefetcher(Numbered(), device=device, prefetch=prefetch), []
    slow = torch.ones(4096, 4096, device=device)
    for _ in range(20):
        batch = feed.next()
        slow = slow @ slow * 0
        sums.append(torch.stack([batch.inputs, batch.targets, batch.documents.numbers]).sum())
        del batch
    assert torch.stack(sums).tolist() == [12 * (3 * first + 3) for first in range(0, 80, 4)]
    feed.close()
