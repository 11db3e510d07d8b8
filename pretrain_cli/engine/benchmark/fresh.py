"""A process of its own for each measurement: precision modes, the allocator's state, how threads
wait and the peak of memory belong to a process, and would leak from one arm into the next."""

import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from pretrain_cli.config import SpeedConfig
from pretrain_cli.engine.process import keep_compiled, take_huge_pages, wait_passively


def in_a_fresh_process(name: str, speed: SpeedConfig, compiled: Path, *arguments: Any) -> Any:
    """What `timing.NAME` gives for these arguments. What is compiled is kept in `compiled`."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=fresh) as process:
        return process.submit(_call, name, speed, compiled, arguments).result()


def serve(tuned: bool, compiled: Path, arm: str, *arguments: Any) -> None:
    """`sample.serve_arm` of an arm, in a process that was just started: `tuned` as `pretrain
    sample` has it."""
    if tuned:
        wait_passively("auto")
        take_huge_pages()
    keep_compiled(compiled)
    importlib.import_module("pretrain_cli.engine.benchmark.sample").serve_arm(arm, *arguments)


def _call(name: str, speed: SpeedConfig, compiled: Path, arguments: tuple[Any, ...]) -> Any:
    wait_passively(speed.passive_threads)  # before torch is loaded
    keep_compiled(compiled)
    timing = importlib.import_module("pretrain_cli.engine.benchmark.timing")
    return getattr(timing, name)(*arguments)
