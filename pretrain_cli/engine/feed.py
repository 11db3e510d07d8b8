"""Batches on the device, the next one read while the current one trains."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pretrain_cli.data.batches import Batches


class Feed:
    """Steps in order, from a sample on. `wait` is how long the last one kept training waiting."""

    def __init__(
        self, batches: Batches, *, first_sample: int, device: torch.device, prefetch: bool
    ) -> None:
        self.batches = batches
        self.device = device
        self.sample = first_sample
        self.wait = 0.0
        self.reader = ThreadPoolExecutor(1, "batches") if prefetch else None
        self.coming: Future[tuple[Tensor, Tensor]] | None = None

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this rank's share of the next step, on the device."""
        asked = time.perf_counter()
        pair = self.coming.result() if self.coming else self._read(self.sample)
        self.sample += self.batches.samples_per_step
        if self.reader:
            self.coming = self.reader.submit(self._read, self.sample)
        inputs, targets = (part.to(self.device, non_blocking=True) for part in pair)
        self.wait = time.perf_counter() - asked
        return inputs, targets

    def _read(self, sample: int) -> tuple[Tensor, Tensor]:
        inputs, targets = (torch.from_numpy(part) for part in self.batches.starting_at(sample))
        if self.device.type == "cuda":
            return inputs.pin_memory(), targets.pin_memory()
        return inputs, targets

    def close(self) -> None:
        if self.reader:
            self.reader.shutdown(wait=True, cancel_futures=True)
