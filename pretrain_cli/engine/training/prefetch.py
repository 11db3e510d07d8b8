"""Batches on the device: a thread reads and copies the next one while the current one trains.

thread         read ── pin ── copy, on a stream of its own ─┐
training step ──────────────────────────────────────────────┴── next step
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain_cli.data.batches import Batches, Samples
from pretrain_cli.data.dataset import Dataset
from pretrain_cli.data.mixture import as_integers
from pretrain_cli.data.opening import open_samples
from pretrain_cli.data.packing import Packed
from pretrain_cli.data.stages import StagedBatches
from pretrain_cli.engine.planning.plan import Plan
from pretrain_cli.engine.runs.events import Emit, Notice
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.transfer import documents_to_device, runs_behind, to_device
from pretrain_cli.model.attention_backends.mask import Documents
from pretrain_cli.spans import span


def open_batches(plan: Plan, ranks: Ranks, emit: Emit) -> "Prefetcher":
    """Open the training samples of a plan, in training order. Builds the index of packed documents
    if it does not exist. Every rank must call it."""
    sources, stages = plan.data.trained_on, plan.stages
    opened: dict[int, list[Samples]] = {}  # by length of a sample
    taken: dict[int, list[int]] = {}  # samples of each source that earlier stages took
    batches: list[tuple[int, Batches]] = []
    for stage, following in zip(stages, (*stages[1:], None), strict=True):
        length = stage.seq_len
        if length not in opened:
            opened[length] = [_open_samples(s.dataset, length, plan, ranks, emit) for s in sources]
            taken[length] = [0] * len(sources)
        samples = opened[length]
        reader = Batches(
            samples,
            as_integers(stage.weights, [len(each) for each in samples]),
            seq_len=length,
            samples_per_step=plan.tokens_per_step // length,
            seed=plan.settings.train.seed,
            documents=plan.settings.data.document_mask,
            rank=ranks.rank,
            world_size=ranks.world_size,
            before=taken[length],
        )
        batches.append((stage.first_step, reader))
        if following is not None:
            steps = following.first_step - stage.first_step
            counts = reader.counts(steps * reader.samples_per_step)
            taken[length] = [sum(pair) for pair in zip(taken[length], counts, strict=True)]
    staged = StagedBatches(batches)
    return Prefetcher(staged, device=ranks.device, prefetch=plan.speed.prefetch)


def _open_samples(dataset: Dataset, seq_len: int, plan: Plan, ranks: Ranks, emit: Emit) -> Samples:
    def opened() -> Samples:
        return open_samples(
            dataset,
            seq_len=seq_len,
            packing=plan.settings.data.packing,
            notify=lambda text: emit(Notice(text)),
        )

    samples = opened() if ranks.is_first else None
    if isinstance(samples, Packed):
        emit(Notice(f"{dataset.path}: {_what_became_of(samples)}"))
    ranks.wait()
    return opened() if samples is None else samples


def _what_became_of(packed: Packed) -> str:
    totals = packed.totals
    return (
        f"{totals.samples:,} samples of whole documents, {totals.share_filled(packed.seq_len):.2%} "
        "of their places filled; "
        f"{totals.cut_documents:,} documents are longer than a sample, and {totals.cut_tokens:,} "
        f"of their tokens ({totals.cut_tokens / totals.tokens:.1%} of all) don't see the beginning"
    )


@dataclass(frozen=True)
class DeviceBatch:
    """One rank's share of a step's `Batch`, as tensors."""

    inputs: Tensor
    targets: Tensor
    documents: Documents | None
    counted: int

    def __getitem__(self, rows: slice) -> "DeviceBatch":
        """Return these rows. `counted` stays that of the whole step."""
        documents = None if self.documents is None else self.documents[rows]
        return DeviceBatch(self.inputs[rows], self.targets[rows], documents, self.counted)


class Prefetcher:
    """Yields the steps' batches in order. `wait` is how many seconds the last one kept training
    waiting."""

    def __init__(
        self, batches: Batches | StagedBatches, *, device: torch.device, prefetch: bool
    ) -> None:
        self.batches = batches
        self.device = device
        self.sample = 0
        self.wait = 0.0
        self.reader = ThreadPoolExecutor(1, "batches") if prefetch else None
        self.coming: Future[DeviceBatch] | None = None
        self.stream = torch.cuda.Stream(device) if runs_behind(device) else None

    def next(self) -> DeviceBatch:
        """Return this rank's share of the next step, on the device."""
        asked = time.perf_counter()
        with span("data"):
            batch = self.coming.result() if self.coming else self._read(self.sample)
            self._wait_for_copy(batch)
            self.sample += self.batches.samples_per_step
            if self.reader:
                self.coming = self.reader.submit(self._read, self.sample)
        self.wait = time.perf_counter() - asked
        return batch

    def at(self, sample: int) -> DeviceBatch:
        """Return this rank's share of the step at another position, without moving."""
        batch = self._read(sample)
        self._wait_for_copy(batch)
        return batch

    def go_to(self, sample: int) -> None:
        """Continue from this sample."""
        self.sample, self.coming = sample, None

    def tokens_of(self, sample: int) -> tuple[int, np.ndarray]:
        """Return one sample, of any rank: the number of its source, and its inputs (T,)."""
        return self.batches.sample(sample)

    def counts(self, sample: int) -> list[int]:
        """Return how many of the samples before this one come from each source."""
        return self.batches.counts(sample)

    def _read(self, sample: int) -> DeviceBatch:
        """Read a batch and start to copy it to the device. A GPU copies it beside the kernels of
        the current step, not after them."""
        read = self.batches.starting_at(sample)
        numbers = read.documents
        with torch.cuda.stream(self.stream):  # does nothing without one
            return DeviceBatch(
                to_device(read.inputs, self.device),
                to_device(read.targets, self.device),
                None if numbers is None else documents_to_device(numbers, self.device),
                read.counted,
            )

    def _wait_for_copy(self, batch: DeviceBatch) -> None:
        """Make the GPU's current stream, not the host, wait for the batch."""
        if self.stream is None:
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        numbers = [] if batch.documents is None else [batch.documents.numbers]
        for tensor in (batch.inputs, batch.targets, *numbers):
            tensor.record_stream(current)  # its memory is free again after this use

    def close(self) -> None:
        if self.reader:
            self.reader.shutdown(wait=True, cancel_futures=True)
