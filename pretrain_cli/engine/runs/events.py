"""Events that a run emits, and the numbers in them.

`train` and `benchmark` know no terminal. They hand events to one callback, `emit`; the command
shows them, and metrics.jsonl keeps those that are numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain_cli.engine.runtime.profiler import Profile


@dataclass(frozen=True)
class Notice:
    """Something a person should know: a choice made for them, a fallback, a skipped checkpoint."""

    text: str


@dataclass(frozen=True)
class Started:
    """The run as it was resolved, before this process's first step."""

    step: int
    """Steps done before."""
    time: float
    run: Path
    model: str
    parameters: int
    dataset: str
    device: str
    ranks: int
    steps: int
    tokens_per_step: int
    flops_per_token: float
    """By the exact mask, a sample taken as one document."""
    flops_per_token_conventional: float
    peak_flops: float
    """Peak FLOP/s of one device, which MFU refers to."""
    peak_source: str
    peak_measured: float


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, and the time since the line before. Lines leave evaluating, sampling and
    saving out of `tokens_per_second` and MFU; those of the run count all of its time."""

    step: int
    time: float
    """Seconds since 1970."""
    seconds: float
    """The run has taken so far, all in all; what was done again after a kill counts once."""
    loss: float
    """The mean over all tokens of the step, on all ranks."""
    learning_rate: float
    gradient_norm: float
    tokens: int
    """Seen so far, by all ranks: places in samples, of which packing leaves some empty."""
    tokens_per_second: float
    run_tokens_per_second: float
    mfu: float
    """Model FLOPs by the exact mask, over the devices' peak. With a document mask, which needs
    fewer, the mask is still counted as if a sample were one document."""
    mfu_conventional: float
    """The same with every token taken to see the whole sample."""
    data_wait: float
    """Seconds a step spent waiting for its batch, on average."""
    save_stall: float
    """Seconds that saving kept training waiting since the last line."""
    evaluation_time: float
    """Seconds spent evaluating and sampling since the last line."""
    memory: int
    """Peak bytes so far: of the GPU, or of the process on a CPU."""
    sources: dict[str, int]
    """Tokens seen so far from each of several datasets, by name."""
    z_loss: float | None = None
    """Z-loss; the sum loss + z_loss + balancing_loss is minimized. None without one."""
    balancing_loss: float | None = None
    expert_load: list[float] | None = None
    """The share of the step's choices that fell on each expert, in all layers."""
    expert_overload: float | None = None
    """The choices of the busiest expert over the mean, in the layer where that is highest."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Loss of a validation split, every token once, or its first ones with train.eval_tokens."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    split_tokens: int
    """Tokens of the whole split."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Validation):
    """The validation splits of all datasets together."""

    step: int
    time: float
    """Seconds since 1970, when it was done."""
    evaluation_time: float
    """Seconds that it took."""
    sources: dict[str, Validation]
    """The same of each of several datasets, by name."""


@dataclass(frozen=True)
class Skipped:
    """A step that changed nothing, and what its batch does to the weights as they are now."""

    step: int
    reason: str
    loss: float
    gradient_norm: float
    samples: tuple[int, int]
    """The first, and the one behind the last."""
    worst_samples: list[dict[str, Any]]
    """Samples with the highest loss: number, source, loss, start of the text."""
    worst_gradients: dict[str, float]
    """The largest norms of gradients, by the tensors' published names."""
    same_weights: bool
    """True if no step was taken between this one and its diagnosis."""
    rollbacks: int
    """Rollbacks before this step."""


@dataclass(frozen=True)
class RolledBack:
    """The run goes on from a checkpoint, with the samples behind those that led astray."""

    step: int
    """Step of the checkpoint."""
    from_step: int
    reason: str
    samples: tuple[int, int]
    """Passed over: the first, and the one that the run goes on with."""
    rollbacks: int
    """Rollbacks including this one."""


@dataclass(frozen=True)
class Profiled:
    """A few steps looked into, up to this one."""

    step: int
    profile: Profile


@dataclass(frozen=True)
class Saved:
    """A checkpoint is there."""

    step: int
    path: Path
    time: float
    """Seconds since 1970, when it was."""
    stall: float
    """Seconds that training waited for it."""
    seconds: float
    """Seconds that writing it took, behind training."""
    bytes: int


@dataclass(frozen=True)
class Unsaved:
    """A save failed. Training goes on, and the next one tries again."""

    step: int
    time: float
    reason: str


@dataclass(frozen=True)
class Sample:
    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Finished:
    run: Path
    step: int
    steps: int
    reason: Literal["done", "stopped"]


Logged = StepMetrics | Evaluation | Skipped | RolledBack | Saved | Unsaved
Event = Notice | Started | Logged | Profiled | Sample | Finished
Emit = Callable[[Event], None]

KINDS: dict[type, str] = {
    Started: "start",
    StepMetrics: "step",
    Evaluation: "evaluation",
    Skipped: "skipped",
    RolledBack: "rollback",
    Saved: "saved",
    Unsaved: "not_saved",
}
