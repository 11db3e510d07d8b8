"""Check and measure this checkout on one GPU within nine minutes.

    .tools/gpu_check                                 everything, best first
    .tools/gpu_check --only parity                   one slot (repeat it for several)
    .tools/gpu_check --rehearse                      everything with tiny shapes, on a CPU

It needs no installation and no network: torch, triton, and what `missing` says in the first
seconds. The folder that the environment variable OUT names, else a new one, receives

    results.jsonl    a JSON line for each result, written at once
    log.txt          output of all slots
    benchmark.json   the timed steps, for `pretrain benchmark --compare`
    profile.txt      the slowest kernels of the measured steps
    tests.xml        the GPU tests, as JUnit
    table.txt, summary.json

A slot that fails or runs over its time says so, and the next one starts. Slots that do not fit
before the deadline are dropped by name. The exit code is 1 if something failed, ran over, or is
wrong; 2 if it could not start.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu.check import RESULTS, Check, latest, read
from gpu.runner import LOG, Outcome, Runner, Slot
from gpu.table import table, write_summary

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 540.0
PATIENCE = 10.0
"""Factor on all limits of a rehearsal, whose processor may be slow and shared."""
ENDING_S = 5.0
"""Seconds at the end for killing the last slot and for the table."""
NEEDED = ("torch", "numpy", "pydantic", "yaml", "safetensors", "tokenizers", "typer", "rich")
USED = {
    "triton": "compiled arms",
    "transformers": "comparisons with it",
    "pytest": "the tests",
    "hypothesis": "the tests",
    "torchao": "float8",
}
PRELOAD = ("torch", "pretrain_cli.engine.benchmark.timing", "pretrain_cli.engine.benchmark.record")

SLOTS = (
    Slot(
        name="env",
        function="gpu.env:run",
        limit_s=45,
        least_s=10,
        about="device, driver, versions, peak of a matrix product and of a copy",
    ),
    Slot(
        name="smoke",
        function="gpu.smoke:run",
        limit_s=40,
        least_s=20,
        about="both families train, save, resume, sample, and open in transformers",
    ),
    Slot(
        name="sync",
        function="gpu.sync:run",
        limit_s=25,
        least_s=15,
        about="steps between two log lines never wait for the GPU",
    ),
    Slot(
        name="tests",
        function="gpu.tests:run",
        limit_s=90,
        least_s=30,
        about="the project's tests marked gpu",
    ),
    Slot(
        name="parity",
        function="gpu.parity:run",
        limit_s=40,
        least_s=15,
        about="attention backends and losses against their readable definitions",
    ),
    Slot(
        name="mfu",
        function="gpu.mfu:run",
        limit_s=150,
        least_s=50,
        is_timed=True,
        about="steps of both families beside transformers, with profiles",
    ),
    Slot(
        name="arms",
        function="gpu.arms:run",
        limit_s=150,
        least_s=30,
        is_timed=True,
        about="windows, losses, optimizers, compile and other settings against each other",
    ),
    Slot(
        name="memory",
        function="gpu.memory:run",
        limit_s=40,
        least_s=20,
        is_timed=True,
        about="the memory estimate against the allocator",
    ),
    Slot(
        name="decode",
        function="gpu.decode:run",
        limit_s=60,
        least_s=25,
        is_timed=True,
        about="sampling, compiled and not, beside transformers",
    ),
    Slot(
        name="fsdp",
        function="gpu.fsdp:run",
        limit_s=20,
        least_s=12,
        about="FSDP2 with one rank learns what one process learns",
    ),
)
"""Slots in order of worth."""
COMPILED_EARLY = ("mfu", "arms", "decode")
"""Slots whose kernels are compiled in the background, while slots that are not timed run."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    asked = _parse(arguments)
    began = time.monotonic()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(
            f"gpu_check: missing: {', '.join(missing)}; put them in a folder on PYTHONPATH",
            file=sys.stderr,
        )
        return 2
    for name, use in USED.items():
        if importlib.util.find_spec(name) is None:
            print(f"no {name}: {use} left out")
    out = Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpu-check-")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    print(f"results: {out}")
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-scratch-"))
    _set_environment(scratch, rehearse=asked.rehearse)
    signal.signal(signal.SIGTERM, _interrupt)
    check = Check(
        slot="",
        out=out,
        scratch=scratch,
        device=asked.device,
        rehearse=asked.rehearse,
        until=began + asked.patience * asked.deadline - ENDING_S,
    )
    try:
        return _run(check, asked, began)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    about = "\n".join(f"  {slot.name:8} {slot.limit_s:4.0f} s  {slot.about}" for slot in SLOTS)
    parser = argparse.ArgumentParser(
        prog="gpu_check",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"slots and their limits, in order:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [slot.name for slot in SLOTS]
    parser.add_argument("--only", action="append", choices=names, default=[], metavar="SLOT")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes; no figure means much")
    parser.add_argument("--device", help="default: cuda, and for a rehearsal cpu")
    parser.add_argument(
        "--deadline", type=float, default=DEADLINE_S, metavar="SECONDS", help="default: %(default)s"
    )
    asked = parser.parse_args(arguments)
    asked.device = asked.device or ("cpu" if asked.rehearse else "cuda")
    asked.patience = PATIENCE if asked.rehearse else 1.0
    return asked


def _set_environment(scratch: Path, *, rehearse: bool) -> None:
    """Set what the slots' processes inherit. They share one cache of compiled kernels."""
    paths = [str(ROOT), str(ROOT / ".tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch / "compiled"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    if rehearse:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    from pretrain_cli.config.run_config import SpeedConfig
    from pretrain_cli.engine.runtime.process_settings import set_env_before_torch, silence_kineto

    set_env_before_torch(SpeedConfig())
    silence_kineto()


def _interrupt(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the summary
    raise KeyboardInterrupt


def _run(check: Check, asked: argparse.Namespace, began: float) -> int:
    slots = [
        replace(slot, limit_s=asked.patience * slot.limit_s)
        for slot in SLOTS
        if not asked.only or slot.name in asked.only
    ]
    runner = Runner(check, preload=PRELOAD, say=lambda text: print(text, flush=True))
    started = datetime.now(UTC).isoformat(timespec="seconds")

    def background() -> None:
        if check.device == "cuda" and not asked.only:
            for slot in slots:
                if slot.name in COMPILED_EARLY:
                    runner.start_background(slot)

    runner.run(slots, background)
    rows = latest(read(check.out / RESULTS))
    text = table(rows)
    (check.out / "table.txt").write_text(text)
    print(text)
    write_summary(
        check.out / "summary.json",
        rows,
        runner.outcomes,
        started=started,
        wall_s=round(time.monotonic() - began, 1),
        rehearse=check.rehearse,
    )
    print(f"{check.out}: {RESULTS}, summary.json, {LOG}")
    return int(_is_bad(rows, runner.outcomes, check))


def _is_bad(rows: list[dict[str, Any]], outcomes: list[Outcome], check: Check) -> bool:
    """Return whether something failed. Without values, only slots can fail."""
    ended = any(outcome.state not in ("done", "dropped") for outcome in outcomes)
    return ended or (check.has_values and any(row.get("ok") is False for row in rows))
