"""Slot `sync`: between two log lines, a training step never waits for the GPU.

The steps run under `torch.cuda.set_sync_debug_mode("error")`, which raises where the host would
wait: `.item()`, a copy from pageable memory, a mask used as an index. The first steps compile and
may wait.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from gpu.check import Check
from gpu.shapes import model_of
from gpu.smoke import write_corpus
from pretrain_cli.api import batches, run_config, tokenize
from pretrain_cli.data.dataset import Dataset
from pretrain_cli.engine.benchmark.timing import LEARNING_RATE
from pretrain_cli.engine.optim.recipe import make_recipe
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.engine.planning.plan import StepPlan
from pretrain_cli.engine.runtime.distributed import Ranks, find_device
from pretrain_cli.engine.runtime.speed import hides_keys, resolve_speed
from pretrain_cli.engine.training.job import set_up
from pretrain_cli.engine.training.prefetch import Prefetcher
from pretrain_cli.engine.training.step import train_step

WARMUP, STEPS, ROWS, MICRO = 3, 4, 8, 4
LENGTH = 256
"""Longer than the window of gemma3-tiny, 128."""


class Case(NamedTuple):
    model: str
    documents: bool
    optimizer: str
    compiled: bool


CASES = (
    Case("gemma3-tiny", False, "adamw", True),
    Case("qwen3-tiny", True, "muon", False),
    Case("gemma3-tiny", True, "adamw", False),
    Case("qwen3-tiny", False, "adamw", True),
)


def run(check: Check) -> None:
    data = check.scratch / "sync"
    dataset = tokenize(write_corpus(data), tokenizer="bytes", out=data / "data", workers=1)
    for case in CASES:
        said = f"{case.model}, {case.optimizer}"
        said += (", documents" if case.documents else "") + (", compiled" if case.compiled else "")
        if check.fits(said, 5 if case.compiled else 2):
            with check.arm(said) as figures:
                take_steps(check, case, dataset)
                figures |= {"ok": True, "steps": STEPS, "micro_steps_per_step": ROWS // MICRO}


def take_steps(check: Check, case: Case, dataset: Dataset) -> None:
    """Take steps as the training loop does between two log lines. Raises where one waits."""
    device = find_device(check.device)
    compiled = case.compiled and device.type == "cuda"
    settings = run_config({"optimizer.name": case.optimizer, "speed.compile": compiled})
    model = model_of(case.model, check)
    masked = hides_keys(model, LENGTH, documents=case.documents)
    plan = StepPlan(
        settings=settings,
        name=case.model,
        model=model,
        speed=resolve_speed(settings.speed, device, is_masked=masked),
        seq_len=LENGTH,
        micro_batch_size=MICRO,
        recipe=make_recipe(settings.optimizer, model, steps=1, tokens_per_step=ROWS * LENGTH),
        loss_weights=None,
    )
    read = batches(dataset, seq_len=LENGTH, samples_per_step=ROWS, document_mask=case.documents)
    job = set_up(plan, Ranks(0, 1, device), Prefetcher(read, device=device, prefetch=True))
    for _ in range(WARMUP):
        train_step(job, job.batches.next(), StepRates(LEARNING_RATE))
    job.guard.read()
    with no_waiting(device):
        for _ in range(STEPS):
            train_step(job, job.batches.next(), StepRates(LEARNING_RATE))
    job.guard.read()
    job.batches.close()


@contextmanager
def no_waiting(device: torch.device) -> Generator[None]:
    """Raise where the host would wait for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
