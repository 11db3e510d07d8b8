"""Slot `mfu`: training steps of both families, beside transformers' in the same process.

    for each model:   T = 1024: ours A, theirs B, then B A, A B, …   a few steps a turn
                      T = 1024 and 4096: ours with a larger micro-batch
                      T = 4096: ours and theirs in turns
                      T = 1024 and 4096: ours with the largest micro-batch

Turns are seconds apart, so a change of the GPU's clock falls on both. MFU counts the FLOPs of the
exact mask, against the stated dense bfloat16 peak (989 TFLOP/s for H100 and H200). transformers
runs under our process settings, compiled whole, with its sdpa attention. Both take the same tokens;
transformers' memory would not allow our larger micro-batches.
"""

import importlib.util
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from gpu.check import Check, free_memory
from gpu.measure import first_call_s, host_ms, kernels, profiled
from gpu.shapes import model_of
from gpu.steps import Ours, Theirs, Timed, estimate_gb
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.record import record
from pretrain_cli.engine.benchmark.rounds import Rounds
from pretrain_cli.engine.benchmark.workload import Arm, Repeats, Workload
from pretrain_cli.engine.runtime.distributed import find_device
from pretrain_cli.engine.runtime.peak_flops import find_peak
from pretrain_cli.files import write_whole

MODELS = ("qwen3-0.6b", "gemma3-270m")
SHAPES = {1024: (8, 16, 32), 4096: (2, 4, 8)}
"""Sequence length -> micro-batches; transformers takes part at the first."""
TINY_SHAPES = {32: (2, 3, 4), 64: (1, 2, 3)}
REPEATS = Repeats(rounds=4, steps=8, warmup=3)
TINY_REPEATS = Repeats(rounds=2, steps=2, warmup=2)
OURS_S, THEIRS_S, PROFILE_S = 12.0, 30.0, 5.0
"""Seconds of a shape with a filled cache of compiled kernels, and of a profile."""
PROFILED_STEPS = 2
TOP = 25
"""Kernels in a profile's table."""
OURS, THEIRS = "pretrain", "transformers"
RECORD, PROFILE = "benchmark.json", "profile.txt"


class Bench:
    """All timed steps, and the benchmark record that they make."""

    def __init__(self, check: Check) -> None:
        self.check, self.device = check, find_device(check.device)
        self.repeats = TINY_REPEATS if check.rehearse else REPEATS
        self.shapes = TINY_SHAPES if check.rehearse else SHAPES
        self.asked = SpeedConfig(compile=self.device.type == "cuda")
        self.rounds: Rounds | None = None
        self.resident: dict[str, int] = {}
        """Bytes that each program holds between steps."""

    def workload(self, name: str, seq_len: int, micro_batch_size: int) -> Workload:
        return Workload(
            name=name,
            model=model_of(name, self.check),
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            device=self.check.device,
        )

    def held_beside(self, program: str) -> int:
        """Return the bytes on the GPU that belong to other programs."""
        return sum(size for name, size in self.resident.items() if name != program)

    def take_round(self, timed: Timed) -> None:
        """Time one round of a step."""
        repeats, held = self.repeats, self.held_beside(timed.program)
        timed.take_round(repeats.steps, repeats.warmup, self.device, held=held)
        held_by_all = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        self.resident[timed.program] = held_by_all - held

    def add(self, timed: Timed, beside: str, *, is_first: bool) -> None:
        """Add a step that has taken a round to the record. If no step came before (`is_first`),
        its loss must be that of the step it is beside."""
        arm = Arm(
            name=timed.name,
            group=f"{timed.workload.name}, T {timed.workload.seq_len}",
            workload=timed.workload,
            speed=self.asked,
            peer=timed.program if timed.program == THEIRS else "",
            same_as=beside if is_first and self.check.has_values else "",
            beside=beside,
        )
        if self.rounds is None:
            self.rounds = Rounds([arm], self.repeats)
            dtype = self.rounds.dtypes[arm.name]
            peak = find_peak(self.device, getattr(torch, dtype), seconds=0.2)
            self.rounds.peaks[dtype] = peak
        else:
            self.rounds.add(arm)
        self.rounds.measured[arm.name] = timed.rounds

    def figures(self, timed: Timed) -> dict[str, Any]:
        """Return a step's figures, and write the record of all steps so far."""
        assert self.rounds is not None
        result = next(each for each in self.rounds.results() if each.arm == timed.name)
        made = record(self.rounds, "vs", ".tools/gpu_check --only mfu")
        write_whole(self.check.out / RECORD, json.dumps(made))
        figures = timed.figures() | {"settings": timed.speed, "differs": result.differs}
        if result.figures is not None:
            figures["tokens_per_s"] = result.figures.tokens_per_second
            figures["mfu"] = result.figures.mfu
            figures["mfu_conventional"] = result.figures.mfu_conventional
        figures["ok"] = not result.differs if result.same_as else None
        return figures


def run(check: Check) -> None:
    bench = Bench(check)
    if check.compile_only:
        compile_all(bench)
        return
    for number, name in enumerate(MODELS):
        bench.check = check.share(1 / (len(MODELS) - number))
        one_model(bench, name)
        bench.resident = {}
        reset_compiler()


def one_model(bench: Bench, name: str) -> None:
    """Time the shapes of one model, the most telling first."""
    (short, (size, larger, largest)), (long, long_sizes) = bench.shapes.items()
    ours = Ours(bench.workload(name, short, size), bench.asked)
    theirs = pair(bench, ours, None, bench.workload(name, short, size))
    alone(bench, ours, bench.workload(name, short, larger))
    alone(bench, ours, bench.workload(name, long, long_sizes[1]))
    pair(bench, ours, theirs, bench.workload(name, long, long_sizes[0]))
    alone(bench, ours, bench.workload(name, short, largest))
    alone(bench, ours, bench.workload(name, long, long_sizes[2]))


def alone(bench: Bench, ours: Ours, workload: Workload) -> None:
    """Time ours at one shape, if there is time."""
    reset_compiler()
    if bench.check.fits(name_of(workload, OURS), OURS_S):
        first_round(bench, ours, workload)


def pair(bench: Bench, ours: Ours, theirs: Theirs | None, workload: Workload) -> Theirs | None:
    """Time ours and theirs in turns, and profile ours at the first shape, where theirs is built.
    Returns theirs, or None if it can't be built."""
    reset_compiler()
    is_first = not bench.resident
    if not bench.check.fits(name_of(workload, OURS), OURS_S):
        return theirs
    mine = first_round(bench, ours, workload)
    if mine is None:
        return theirs
    if is_first:
        profile(bench, mine)
    name = name_of(workload, THEIRS)
    if importlib.util.find_spec(THEIRS) is None or not bench.check.fits(name, THEIRS_S):
        return theirs
    if theirs is None:
        with bench.check.arm(f"{name}, building"):
            theirs = Theirs(workload, ours.speed)
    if theirs is None:
        return None
    other = first_round(bench, theirs, workload, beside=mine.name, is_first=is_first)
    if other is not None:
        in_turns(bench, mine, other)
    return theirs


def first_round(
    bench: Bench,
    program: Ours | Theirs,
    workload: Workload,
    *,
    beside: str = "",
    is_first: bool = False,
) -> Timed | None:
    """Take and write the first round of a shape; return None if it fails."""
    said = OURS if isinstance(program, Ours) else THEIRS
    speed = program.speed
    timed = Timed(
        name_of(workload, said), program.step_of(workload), workload, said, speed.record()
    )
    with bench.check.arm(timed.name) as figures:
        free_memory()
        bench.take_round(timed)
        if said == OURS:
            timed.others["host_ms"] = host_ms(timed.step, bench.device)
            timed.others["estimate_gb"] = estimate_gb(workload, speed)
        bench.add(timed, beside, is_first=is_first)
        figures |= bench.figures(timed)
        return timed
    return None


def in_turns(bench: Bench, mine: Timed, other: Timed) -> None:
    """Take the other rounds of two steps in turns, and write both again."""
    turns = [other, mine]
    with bench.check.arm(f"{other.name}, in turns") as figures:
        for _ in range(bench.repeats.rounds - 1):
            for timed in turns:
                bench.take_round(timed)
            turns.reverse()
        ratios = [
            statistics.median(b.times) / statistics.median(a.times)
            for a, b in zip(mine.rounds, other.rounds, strict=True)
        ]
        figures["speed_ratio"] = statistics.median(ratios)
        figures["speed_ratio_least"], figures["speed_ratio_most"] = min(ratios), max(ratios)
        figures["note"] = "tokens/s of ours divided by theirs"
        for timed in (mine, other):
            bench.check.write(timed.name, **bench.figures(timed))


def profile(bench: Bench, timed: Timed) -> None:
    """Write the kernels of a step, and append a table of the slowest to profile.txt."""
    name = f"{timed.name}, profile"
    if not bench.check.fits(name, PROFILE_S):
        return
    with bench.check.arm(name) as figures:
        found = profiled(
            timed.step,
            bench.device,
            calls=PROFILED_STEPS,
            with_kernels=bench.check.has_values,
        )
        rows = kernels(found, PROFILED_STEPS)
        busy = sum(row["ms_per_call"] for row in rows)
        figures["kernels_per_step"] = sum(row["count_per_call"] for row in rows)
        figures["kernel_ms"] = busy
        figures["gpu_busy"] = busy / timed.figures()["step_median_ms"]
        figures["kernels"] = rows[:TOP]
        lines = [f"{timed.name}: {busy:.2f} ms of kernels a step"]
        lines += [
            f"{row['ms_per_call']:9.3f} ms {row['share']:6.1%} {row['count_per_call']:7.1f} × "
            f"{row['kernel'][:110]}"
            for row in rows[:TOP]
        ]
        with Path(bench.check.out / PROFILE).open("a") as file:
            file.write("\n".join(lines) + "\n\n")


def compile_all(bench: Bench) -> None:
    """Fill the cache of compiled kernels, and write how long each shape takes from nothing."""
    if bench.device.type == "cuda":  # leaves memory to the slots that run meanwhile
        torch.cuda.set_per_process_memory_fraction(0.6, bench.device)
    for seq_len, sizes in bench.shapes.items():
        for name in MODELS:
            workload = bench.workload(name, seq_len, sizes[0])
            program: Ours | Theirs = Ours(workload, bench.asked)
            compile_one(bench, program, workload)
            for size in sizes[1:2]:
                reset_compiler()
                compile_one(bench, program, bench.workload(name, seq_len, size))
            speed = program.speed
            del program
            reset_compiler()
            if importlib.util.find_spec(THEIRS):
                compile_one(bench, Theirs(workload, speed), workload)
                reset_compiler()


def compile_one(bench: Bench, program: Ours | Theirs, workload: Workload) -> None:
    said = OURS if isinstance(program, Ours) else THEIRS
    with bench.check.arm(name_of(workload, said)) as figures:
        step = program.step_of(workload)
        first = first_call_s(step, bench.device)
        figures["compile_s"] = first - first_call_s(step, bench.device)
        figures["note"] = "from nothing, beside other slots"


def name_of(workload: Workload, program: str) -> str:
    shape = f"T {workload.seq_len}, micro-batch {workload.micro_batch_size}"
    return f"{workload.name}, {shape}, {program}"


def reset_compiler() -> None:
    """Forget compiled code, so that the next shape is compiled for itself and not as one of any
    size, and free memory. Kernels stay in the cache on disk."""
    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
    free_memory()
