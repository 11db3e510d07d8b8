"""Turn rounds into results: medians, rates and MFU, and whether an arm learned the same as the arm
it must equal."""

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Any

from pretrain_cli.engine.benchmark.timing import Round
from pretrain_cli.engine.benchmark.workload import Arm
from pretrain_cli.engine.runtime.peak_flops import Peak
from pretrain_cli.engine.runtime.process_settings import PROCESS_SETTINGS
from pretrain_cli.model import counting

TOLERANCE = {"float32": 1e-4, "tf32": 2e-3, "bfloat16": 1e-2, "float8": 1e-1}
"""Largest relative difference of an arm's loss from that of the arm it must equal, by the coarser
of their types. In float8 each step feeds rounding back: an arm that has nearly memorized a few
tokens may exceed it."""
NORM_TOLERANCE = TOLERANCE | {"float8": 3e-2}
"""The same tolerance for the first gradient norm, before any step: float8 differs by about 1e-2."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures over all steps of all rounds. Times are seconds."""

    step_median: float
    step_fastest: float
    step_slowest: float
    warmup: float
    """Seconds of all warm-up steps in the first round."""
    compile_time: float
    """Compile time: seconds of the warm-up beyond as many median steps."""
    tokens_per_second: float
    """Rate at the median step time."""
    mfu: float
    mfu_conventional: float
    peak_memory: int
    """Peak bytes during the counted steps."""
    loss: float
    """Loss after all steps of a round; the tokens are the same in every round."""
    loss_difference: float | None
    """Relative difference of the loss from the arm it must equal; None if there is none."""
    gradient_norm_difference: float | None
    """The same for the first step's gradient norm, before clipping."""
    worth: float | None
    """Tokens/s divided by that of the arm it is compared with; median over the rounds."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """An arm, and its measurements."""

    arm: str
    group: str
    peer: str
    kind: str
    """"training step", "forward only" or "not run"."""
    reason: str
    """Reason it is not a training step; empty if it is one."""
    notes: list[str]
    """Requested settings that are not in force."""
    same_as: str
    beside: str
    differs: str
    """Difference between this arm's result and that of the arm it must equal; empty if there is
    none."""
    workload: dict[str, Any]
    tokens_per_step: int
    flops_per_token: float
    """FLOPs per token under the exact mask; a third of that for a forward pass."""
    flops_per_token_conventional: float
    peak_flops: float
    """Peak FLOP/s that MFU refers to."""
    speed: dict[str, Any]
    figures: Figures | None
    rounds: list[Round]


def summarize(
    arm: Arm, measured: dict[str, list[Round]], peak: Peak | None, failure: str = ""
) -> Result:
    """Return an arm's result, from the rounds of all arms."""
    rounds = measured[arm.name]
    reference, beside = measured.get(arm.same_as, []), measured.get(arm.beside, [])
    flops = counting.training_flops(arm.workload.model, arm.workload.seq_len)
    part = 1 / 3 if arm.forward_only else 1
    figures, differs = None, ""
    if rounds and peak:
        first = rounds[0]
        times = [seconds for one in rounds for seconds in one.times]
        median = statistics.median(times)
        rate = arm.workload.tokens / median
        loss, norm = _differences(first, reference[0]) if reference else (None, None)
        if reference:
            differs = _said(arm, loss, norm, coarser(first, reference[0]))
        figures = Figures(
            step_median=median,
            step_fastest=min(times),
            step_slowest=max(times),
            warmup=sum(first.warmup),
            compile_time=max(0.0, sum(first.warmup) - len(first.warmup) * median),
            tokens_per_second=rate,
            mfu=flops.exact * part * rate / peak.flops,
            mfu_conventional=flops.conventional * part * rate / peak.flops,
            peak_memory=max(one.peak_memory for one in rounds),
            loss=first.losses[-1],
            loss_difference=loss,
            gradient_norm_difference=norm,
            worth=statistics.median(_rate_ratios(rounds, beside)) if beside else None,
        )
    kind = "forward only" if arm.forward_only else "training step"
    left_out = arm.left_out or failure
    speed = _meant(arm, rounds[0].speed) if rounds else {}
    return Result(
        arm=arm.name,
        group=arm.group,
        peer=arm.peer,
        kind="not run" if left_out else kind,
        reason=left_out or arm.forward_only,
        notes=_notes(speed),
        same_as=arm.same_as,
        beside=arm.beside,
        differs=differs,
        workload=dataclasses.asdict(arm.workload),
        tokens_per_step=arm.workload.tokens,
        flops_per_token=flops.exact * part,
        flops_per_token_conventional=flops.conventional * part,
        peak_flops=peak.flops if peak else 0.0,
        speed=speed,
        figures=figures,
        rounds=rounds,
    )


def coarser(one: Round, other: Round) -> str:
    """Return the coarser of two rounds' types, the one whose rounding is larger."""
    return max((_precision(one.speed), _precision(other.speed)), key=TOLERANCE.__getitem__)


def _precision(speed: dict[str, Any]) -> str:
    dtype = speed["dtype"]["in_force"]
    if dtype == "float32" and speed["float32_matmul"]["in_force"] != "highest":
        return "tf32"
    return dtype


def _differences(one: Round, other: Round) -> tuple[float, float]:
    """Return the relative differences of the last losses and of the first gradient norms."""
    pairs = (
        (one.losses[-1], other.losses[-1]),
        (one.gradient_norms[0], other.gradient_norms[0]),
    )
    loss, norm = (_relative(*pair) for pair in pairs)
    return loss, norm


def _relative(mine: float, theirs: float) -> float:
    if not theirs:
        return 0.0 if mine == theirs else math.inf
    return abs(mine - theirs) / abs(theirs)


def _said(arm: Arm, loss: float | None, norm: float | None, kind: str) -> str:
    found = []
    for what, difference, most in (
        ("loss", loss, TOLERANCE[kind]),
        ("first gradient norm", norm, NORM_TOLERANCE[kind]),
    ):
        # `not <=` instead of `>`: a NaN difference counts as too large
        if difference is not None and not difference <= most:
            found.append(f"{what} {difference:.2g} of its size off, and {kind} explains {most:g}")
    return f"differs from {arm.same_as}: {'; '.join(found)}" if found else ""


def _meant(arm: Arm, speed: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that apply to a peer."""
    if not arm.peer:
        return speed
    return {name: speed[name] for name in ("dtype", "compile", *PROCESS_SETTINGS)}


def _notes(speed: dict[str, Any]) -> list[str]:
    notes = [
        f"{name} is {setting['in_force']}: {setting['reason']}"
        for name, setting in speed.items()
        if setting["asked"] not in ("auto", setting["in_force"])
    ]
    if speed and speed["dtype"]["in_force"] == "float8":
        notes.append("MFU is a share of bfloat16's peak")
    return notes


def _rate_ratios(rounds: list[Round], others: list[Round]) -> list[float]:
    """Return tokens/s divided by the other arm's, round by round."""
    return [
        (one.tokens / statistics.median(one.times))
        / (other.tokens / statistics.median(other.times))
        for one, other in zip(rounds, others, strict=False)
    ]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Our arm divided by a peer's arm with the same use of compile. Computed round by round: a
    machine that is slow for a while slows both."""

    arm: str
    ours: str
    tokens_per_second: float
    """Median over the rounds of our rate divided by the peer's."""
    lowest: float
    highest: float
    peak_memory: float
    """Our peak memory divided by the peer's."""


def ratios(results: list[Result]) -> list[Ratio]:
    """Return the ratios of our arms to every peer arm that ran."""
    ours = {r.speed["compile"]["in_force"]: r for r in results if r.figures and not r.peer}
    found = []
    for result in results:
        mine = (
            ours.get(result.speed["compile"]["in_force"])
            if result.peer and result.figures
            else None
        )
        if mine is None or mine.figures is None or result.figures is None:
            continue
        rates = _rate_ratios(mine.rounds, result.rounds)
        found.append(
            Ratio(
                arm=result.arm,
                ours=mine.arm,
                tokens_per_second=statistics.median(rates),
                lowest=min(rates),
                highest=max(rates),
                peak_memory=mine.figures.peak_memory / result.figures.peak_memory,
            )
        )
    return found
