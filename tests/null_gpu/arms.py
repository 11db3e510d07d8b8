"""Arms: training steps of the product on the null GPU, and what each was seen to do.

An arm has the real widths of a published model and few layers. Data, plan, job and step are those
of `pretrain train`.
"""

import gc
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from pretrain_cli.config.build import build_config
from pretrain_cli.engine.planning.memory_estimate import StepShape, estimate, speed_settings
from pretrain_cli.engine.planning.plan import Plan, make_plan
from pretrain_cli.engine.runs.events import ignore
from pretrain_cli.engine.runtime.distributed import open_ranks
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.engine.training.evaluate import evaluate
from pretrain_cli.engine.training.job import Job, set_up
from pretrain_cli.engine.training.prefetch import open_batches
from pretrain_cli.engine.training.step import train_step
from pretrain_cli.model.config import FULL, SLIDING
from pretrain_cli.model.decoder import Decoder
from tests.null_gpu.null_gpu import Kernel, Seen, compiled_kernels, watch

QWEN, GEMMA = "qwen3-0.6b", "gemma3-270m"
LAYERS = {GEMMA: [SLIDING] * 5 + [FULL], QWEN: [FULL] * 6}
VOCABULARY = {GEMMA: 262_144, QWEN: 151_936}
TOKENS = 16_384
"""Tokens of a step."""
WARMUP_STEPS = 2
"""Steps before the watched ones: everything is compiled, and the optimizer has its state."""
WATCHED_STEPS = 3


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    model: str
    attention: str = "auto"
    seq_len: int = 1024
    documents: bool = False
    optimizer: str = "adamw"
    micro_steps: int = 1
    compile: bool = False
    cuda_graphs: bool = False
    dtype: str = "auto"

    def __str__(self) -> str:
        parts = [self.model, self.attention, str(self.seq_len), self.optimizer]
        parts += ["documents"] * self.documents + ["compiled"] * self.compile
        parts += ["graphs"] * self.cuda_graphs
        parts += [f"{self.micro_steps} micro-steps"] * (self.micro_steps > 1)
        return " ".join(parts + [self.dtype] * (self.dtype != "auto"))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Observations of an arm's watched steps."""

    plan: Plan
    seen: Seen
    launches: int
    """Launches of one step."""
    peak: int
    """Largest number of bytes allocated at once in the watched steps."""
    estimated: int
    """The program's estimate of it."""
    kernels: list[Kernel]
    """All Triton kernels that were compiled, candidates of autotuning included."""
    graphs_at_first: int
    """Graphs compiled by the first two steps."""
    graphs_later: int
    """Graphs compiled by the watched steps."""


def measure(arm: Arm, dataset: Path) -> Measured:
    """Take the arm's steps and observe the last ones."""
    with ExitStack() as stack:
        job = stack.enter_context(open_job(arm, dataset))
        kernels = stack.enter_context(compiled_kernels())
        steps(job, WARMUP_STEPS)
        at_first = graphs()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with watch() as seen:
            steps(job, WATCHED_STEPS)
        launches, rest = divmod(seen.launches, WATCHED_STEPS)
        assert not rest, f"steps differ: {seen.launches} launches in {WATCHED_STEPS} steps"
        return Measured(
            plan=job.plan,
            seen=seen,
            launches=launches,
            peak=torch.cuda.max_memory_allocated(),
            estimated=estimated(job.plan),
            kernels=kernels,
            graphs_at_first=at_first,
            graphs_later=graphs() - at_first,
        )


@contextmanager
def open_job(arm: Arm, dataset: Path) -> Generator[Job[Plan]]:
    """Set up a job as `train` does, with empty caches of compiled code and an empty device."""
    gc.collect()
    torch._dynamo.reset()
    counters.clear()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    settings = build_config({}, settings_of(arm, dataset), [])
    with ExitStack() as stack:
        stack.enter_context(fresh_cache())
        # Drawing a vocabulary of this size takes seconds, and the device would keep zeros.
        stack.enter_context(mock.patch.object(Decoder, "initialize"))
        ranks = stack.enter_context(open_ranks("cuda"))
        plan = make_plan(settings, ranks, ignore, StopRequest())
        job = set_up(plan, ranks, open_batches(plan, ranks, ignore))
        stack.callback(job.batches.close)
        yield job


def settings_of(arm: Arm, dataset: Path) -> dict[str, object]:
    """Return the settings of a run, by name."""
    return {
        "model.name": arm.model,
        "model.layer_types": LAYERS[arm.model],
        "model.vocab_size": VOCABULARY[arm.model],
        "data.path": dataset,
        "data.seq_len": arm.seq_len,
        "data.document_mask": arm.documents,
        "train.device": "cuda",
        "train.tokens_per_step": TOKENS,
        "train.micro_batch_size": TOKENS // arm.seq_len // arm.micro_steps,
        "train.steps": 100,
        "optimizer.name": arm.optimizer,
        "speed.attention": arm.attention,
        "speed.compile": arm.compile,
        "speed.cuda_graphs": arm.cuda_graphs,
        "speed.dtype": arm.dtype,
    }


def steps(job: Job[Plan], count: int) -> None:
    """Take steps as the training loop does between two logs."""
    for step in range(count):
        train_step(job, job.batches.next(), job.plan.rates_at(step))


def evaluation(job: Job[Plan]) -> None:
    """Evaluate as the training loop does."""
    job.model.eval()
    evaluate(
        job.model,
        job.plan.data,
        step=0,
        seq_len=job.plan.seq_len,
        batch_size=job.plan.micro_batch_size,
        ranks=job.ranks,
        document_mask=job.plan.settings.data.document_mask,
    )


def graphs() -> int:
    """Return how many graphs were compiled since the job was opened."""
    return counters["stats"]["unique_graphs"]


def estimated(plan: Plan) -> int:
    """Return the program's estimate of the peak of a step, as `choose_micro_batch_size` makes
    it."""
    return estimate(
        StepShape(
            model=plan.model,
            seq_len=plan.seq_len,
            micro_batch_size=plan.micro_batch_size,
            is_accumulated=plan.micro_batch_size < plan.samples_per_step,
            document_mask=plan.settings.data.document_mask,
            device="cuda",
            optimizer=plan.settings.optimizer.name,
            **speed_settings(plan.speed),
        )
    ).peak
