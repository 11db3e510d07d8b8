"""Slot `memory`: the project's estimate of a step's peak memory against the allocator's count.

`estimate_ratio` is the estimate divided by the peak; the program takes 0.9 of the memory by its
estimate, so less than 0.9 is wrong. The steps are not compiled; `mfu` has the compiled ones.
"""

from typing import Any, NamedTuple

from gpu.check import Check
from gpu.measure import GB
from gpu.mfu import reset_compiler
from gpu.shapes import model_of
from gpu.steps import Ours, Timed, estimate_gb
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.workload import Workload
from pretrain_cli.engine.planning.memory_estimate import USABLE_FRACTION
from pretrain_cli.engine.runtime.distributed import find_device

SECONDS = 4.0


class Shape(NamedTuple):
    model: str
    seq_len: int
    rows: int
    speed: dict[str, Any]


SHAPES = (
    Shape("gemma3-270m", 1024, 8, {}),
    Shape("gemma3-270m", 8192, 2, {}),
    Shape("gemma3-270m", 1024, 4, {"chunked_loss": False}),
    Shape("qwen3-0.6b", 1024, 8, {}),
    Shape("qwen3-0.6b", 4096, 4, {"activation_checkpointing": True}),
    Shape("qwen3-0.6b", 1024, 2, {"attention": "eager"}),
)


def run(check: Check) -> None:
    device = find_device(check.device)
    for shape in SHAPES:
        said = ", ".join(f"{name} {value}" for name, value in shape.speed.items())
        name = f"{shape.model}, T {shape.seq_len}, micro-batch {shape.rows}"
        name += f", {said}" if said else ""
        if not check.fits(name, SECONDS):
            continue
        with check.arm(name) as figures:
            workload = Workload(
                name=shape.model,
                model=model_of(shape.model, check),
                seq_len=min(shape.seq_len, 64) if check.rehearse else shape.seq_len,
                micro_batch_size=shape.rows,
                device=check.device,
            )
            ours = Ours(workload, SpeedConfig.model_validate({"compile": False} | shape.speed))
            timed = Timed(name, ours.step_of(workload), workload, "pretrain", ours.speed.record())
            timed.take_round(2, 2, device)
            peak = max(timed.rounds[0].peak_memory, timed.rounds[0].warmup_peak_memory) / GB
            figures["allocated_peak_gb"] = peak
            if timed.reserved:
                figures["reserved_peak_gb"] = timed.reserved / GB
            figures["estimate_gb"] = estimate_gb(workload, ours.speed)
            figures["estimate_ratio"] = figures["estimate_gb"] / peak
            if device.type == "cuda" and not check.rehearse:
                figures["ok"] = figures["estimate_ratio"] >= USABLE_FRACTION
            del ours, timed
        reset_compiler()
