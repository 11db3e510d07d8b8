"""A process of its own for each measurement: precision modes, the allocator's state, how threads
wait and the peak of memory belong to a process, and would leak from one arm into the next."""

import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.interruption import unheard_by_children
from pretrain_cli.engine.runtime.process_settings import set_compile_cache, set_env_before_torch


def in_a_fresh_process(name: str, speed: SpeedConfig, compiled: Path, *arguments: Any) -> Any:
    """Return the result of `timing.NAME` with these arguments, computed in a fresh process.
    Compiled kernels are cached in `compiled`. An interrupt kills the process."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=fresh) as process:
        try:
            with unheard_by_children():
                called = process.submit(_call, name, speed, compiled, arguments)
            return called.result()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def serve(ours: SpeedConfig | None, compiled: Path, arm: str, *arguments: Any) -> None:
    """`writers.serve_arm` of an arm, in a process that was just started: ours, with these settings,
    as `pretrain sample` has it; or another program's."""
    if ours is not None:
        set_env_before_torch(ours)
    set_compile_cache(compiled)
    importlib.import_module("pretrain_cli.engine.benchmark.sample_arm").serve_arm(arm, *arguments)


def _call(name: str, speed: SpeedConfig, compiled: Path, arguments: tuple[Any, ...]) -> Any:
    set_env_before_torch(speed)
    set_compile_cache(compiled)
    timing = importlib.import_module("pretrain_cli.engine.benchmark.timing")
    return getattr(timing, name)(*arguments)
