"""Events that a run emits.

`train` and `benchmark` know no terminal. They pass events to one callback, `emit`; the command
displays them, and metrics.jsonl keeps those with numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain_cli.engine.runtime.profiler import Profile


@dataclass(frozen=True)
class Notice:
    """Message for the user: an automatic choice, a fallback, a skipped checkpoint."""

    text: str


@dataclass(frozen=True)
class Started:
    """The resolved run, before the first step of this process."""

    step: int
    """Steps done by earlier processes."""
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
    """FLOPs per token under the exact mask, with a sample as one document."""
    flops_per_token_conventional: float
    peak_flops: float
    """Peak FLOP/s of one device, the denominator of MFU."""
    peak_source: str
    peak_measured: float


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one logged step and of the interval since the line before.

    `tokens_per_second` and MFU leave out evaluating, sampling and saving; those of the whole run
    include all of its time.
    """

    step: int
    time: float
    """Seconds since 1970."""
    seconds: float
    """Seconds the run has taken so far; steps repeated after a kill count once."""
    loss: float
    """Mean over all tokens of the step, on all ranks."""
    learning_rate: float
    gradient_norm: float
    tokens: int
    """Tokens seen so far by all ranks. Counts positions in samples; packing leaves some of them
    empty."""
    tokens_per_second: float
    run_tokens_per_second: float
    mfu: float
    """Model FLOPs under the exact mask, over the devices' peak. A document mask needs fewer FLOPs,
    but each sample is still counted as one document."""
    mfu_conventional: float
    """MFU as if every token attended to the whole sample."""
    data_wait: float
    """Mean seconds that a step waited for its batch."""
    save_stall: float
    """Seconds that training waited for saves since the last line."""
    evaluation_time: float
    """Seconds spent evaluating and sampling since the last line."""
    memory: int
    """Peak bytes so far: allocated on the GPU, or resident in the process on a CPU."""
    memory_reserved: int | None
    """Peak bytes so far that torch holds on the GPU: a run ends when these run out. None on other
    devices."""
    sources: dict[str, int]
    """Tokens seen so far from each dataset by name, if there are several."""
    z_loss: float | None = None
    """Z-loss, or None without one. The step minimizes loss + z_loss + balancing_loss."""
    balancing_loss: float | None = None
    expert_load: list[float] | None = None
    """Share of the step's routing choices that each expert received, over all layers."""
    expert_overload: float | None = None
    """Choices of the busiest expert divided by the mean, in the layer where this is highest."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Loss on a validation split: every token once, or the first train.eval_tokens."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    split_tokens: int
    """Tokens in the whole split."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Validation):
    """Loss on the validation splits of all datasets together."""

    step: int
    time: float
    """Seconds since 1970 at the end of the evaluation."""
    evaluation_time: float
    """Seconds the evaluation took."""
    sources: dict[str, Validation]
    """Result of each dataset by name, if there are several."""


@dataclass(frozen=True)
class Skipped:
    """A skipped step, and a diagnosis of its batch with the current weights."""

    step: int
    reason: str
    loss: float
    gradient_norm: float
    samples: tuple[int, int]
    """First sample, and one past the last."""
    worst_samples: list[dict[str, Any]]
    """Samples with the highest loss: number, source, loss, start of the text."""
    worst_gradients: dict[str, float]
    """Largest gradient norms by published tensor name."""
    same_weights: bool
    """True if no step was taken between the skipped one and its diagnosis."""
    rollbacks: int
    """Rollbacks before this step."""


@dataclass(frozen=True)
class RolledBack:
    """The run resumed from an earlier checkpoint, skipping the samples since."""

    step: int
    """Step of that checkpoint."""
    from_step: int
    reason: str
    samples: tuple[int, int]
    """First skipped sample, and the sample at which the run continues."""
    rollbacks: int
    """Rollbacks including this one."""


@dataclass(frozen=True)
class Profiled:
    """A profile was written of the last few steps."""

    step: int
    profile: Profile


@dataclass(frozen=True)
class Saved:
    """A checkpoint was saved."""

    step: int
    path: Path
    time: float
    """Seconds since 1970 when it was complete."""
    stall: float
    """Seconds that training waited for it."""
    seconds: float
    """Seconds that writing took, in the background."""
    bytes: int


@dataclass(frozen=True)
class Unsaved:
    """A save failed. Training continues, and the next save tries again."""

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


def ignore(event: Event) -> None:
    """Do nothing: the `emit` of ranks other than the first, and of work that nobody watches."""


KINDS: dict[type, str] = {
    Started: "start",
    StepMetrics: "step",
    Evaluation: "evaluation",
    Skipped: "skipped",
    RolledBack: "rollback",
    Saved: "saved",
    Unsaved: "not_saved",
}
