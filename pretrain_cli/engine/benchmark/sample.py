"""Benchmark of sampling: prefill of a prompt, then greedy decoding token by token.

Each arm (sample_arm.py) runs in its own fresh process with the same random weights; the process
settings apply to our arms only. Arms take turns, so that a temporary slowdown affects all of them.
Loading, compiling and one warm-up round are timed separately.

The limit is memory bandwidth: each token reads all weights and the cache of its text. It is
estimated from the rate at which this machine copies a large buffer, counting bytes read and
written, divided by those bytes.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from pretrain_cli.engine.benchmark.sample_arm import (
    OURS,
    THEIRS,
    Ready,
    Round,
    Workload,
    settings_of,
    speed_of,
)
from pretrain_cli.engine.benchmark.workload import serve
from pretrain_cli.engine.runtime.distributed import find_device
from pretrain_cli.engine.runtime.process_settings import check_process_settings
from pretrain_cli.engine.runtime.speed import build_model
from pretrain_cli.engine.sampling.open_model import wants_int8
from pretrain_cli.engine.sampling.sample import refuse_int8_off_cpu
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.counting import cache_bytes, count_parameters
from pretrain_cli.model.formats.hf_config import to_config_json
from pretrain_cli.model.formats.hf_weights import published_tensors, write_weights

WARM_UP = 8
"""Tokens of the round that is not counted."""
COPIED = 2**28
"""Bytes of the buffer copied to measure memory bandwidth: far larger than any cache."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of one arm; medians over the rounds."""

    arm: str
    load_seconds: float
    compile_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    share_of_limit: float
    ratio: float | None
    """Our decode rate divided by this arm's, median over the rounds; None for our own arm."""
    agreed: int | None
    """Tokens of the first text before the first one that differs from ours."""
    rounds: list[tuple[float, float]]
    """Prefill and decode rates of each round."""
    said: list[str]
    speed: dict[str, Any]
    """Our settings as requested and as in force; empty for transformers."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Results of all arms, and the machine's limits."""

    results: list[Result]
    step_bytes: float
    copy_rate: float
    """Bytes per second, read and written."""
    limit: float
    """Tokens per second of the whole batch if a step took only the time to read memory."""


def measure(workload: Workload, progress: Callable[[str], None]) -> Measured:
    """Measure our rates and those of the other arms."""
    for arm in workload.vs:
        if arm != THEIRS and not arm.startswith("speed."):
            raise ConfigError(f"--vs: '{arm}' is not {THEIRS}, and not speed.NAME=VALUE")
    check_process_settings("--vs", (arm for arm in workload.vs if arm != THEIRS))
    if wants_int8(workload.quantize, workload.model):
        refuse_int8_off_cpu(find_device(workload.device))
    arms = [OURS, *dict.fromkeys(workload.vs)]
    turns: dict[str, list[Round]] = {arm: [] for arm in arms}
    ready = {}
    progress("drawing weights")
    with _drawn_folder(workload) as folder, _processes(workload, arms, folder) as pipes:
        for arm, pipe in pipes.items():  # one at a time: concurrent loads would distort the timings
            progress(f"{arm}: loading")
            pipe.send(workload)
            ready[arm] = _receive(pipe, arm)
        for number in range(-1, workload.rounds):
            for arm, pipe in pipes.items():
                progress(f"{arm}: round {number + 1} of {workload.rounds}")
                pipe.send(workload.tokens if number >= 0 else min(WARM_UP, workload.tokens))
                turn = _receive(pipe, arm)
                if number >= 0:
                    turns[arm].append(turn)
    rate, read = copy_rate(find_device(workload.device)), step_bytes(workload)
    limit = workload.batch * rate / read
    return Measured(
        results=[_result(arm, workload, ready[arm], turns, limit) for arm in arms],
        step_bytes=read,
        copy_rate=rate,
        limit=limit,
    )


def step_bytes(workload: Workload) -> float:
    """Return the bytes that a decoding step reads: the weights in use, and the average cache of the
    texts."""
    config = workload.model
    size = speed_of(workload).compute_dtype.itemsize
    count = count_parameters(config)
    matrices = count.active - (0 if config.tie_word_embeddings else count.embeddings)
    middle = workload.prompt + workload.tokens // 2
    each = size if workload.quantize is None else 1
    return each * matrices + workload.batch * cache_bytes(config, middle, size)


def copy_rate(device: torch.device) -> float:
    """Return bytes per second, read and written, of the fastest of several copies."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # wait for the device
        best = min(best, time.perf_counter() - began)
    return 2 * COPIED / best


def _result(
    arm: str, workload: Workload, ready: Ready, turns: dict[str, list[Round]], limit: float
) -> Result:
    prefilled = workload.batch * workload.prompt
    decoded = workload.batch * (workload.tokens - 1)
    rates = [(prefilled / turn.prefill, decoded / turn.decode) for turn in turns[arm]]
    ours, theirs = turns[OURS], turns[arm]
    decode = statistics.median(rate for _, rate in rates)
    is_ours = arm == OURS
    agreed = next(
        (i for i, pair in enumerate(zip(ours[0].tokens, theirs[0].tokens, strict=True))
         if pair[0] != pair[1]),
        workload.tokens,
    )  # fmt: skip
    return Result(
        arm=arm,
        load_seconds=ready.load,
        compile_seconds=ready.compile,
        prefill_tokens_per_second=statistics.median(rate for rate, _ in rates),
        decode_tokens_per_second=decode,
        share_of_limit=decode / limit,
        ratio=None
        if is_ours
        else statistics.median(b.decode / a.decode for a, b in zip(ours, theirs, strict=True)),
        agreed=None if is_ours else agreed,
        rounds=rates,
        said=ready.said,
        speed=ready.speed,
    )


# --- the processes --------------------------------------------------------------------------------


@contextmanager
def _processes(
    workload: Workload, arms: list[str], folder: Path
) -> Generator[dict[str, Connection]]:
    """Start a fresh process for each arm, with a pipe for requests."""
    fresh = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    try:
        for arm in arms:
            pipes[arm], theirs = fresh.Pipe()
            ours = None if arm == THEIRS else settings_of(workload, arm)
            process = fresh.Process(
                target=serve,
                args=(ours, folder / "compiled", arm, folder, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
        yield pipes
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join(timeout=5)
            process.terminate()


def _receive(pipe: Connection, arm: str) -> Any:
    try:
        answer = pipe.recv()
    except EOFError:
        raise RuntimeError(f"{arm}: its process ended") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextmanager
def _drawn_folder(workload: Workload) -> Generator[Path]:
    """Yield a temporary model folder with random weights in the compute type."""
    speed = speed_of(workload)
    model = build_model(workload.model, speed, torch.device("cpu"))
    model.initialize(0)
    dtype = speed.compute_dtype
    with tempfile.TemporaryDirectory(prefix="pretrain-benchmark-") as name:
        raw = to_config_json(workload.model, str(dtype).removeprefix("torch."))
        Path(name, "config.json").write_text(json.dumps(raw))
        write_weights(Path(name), published_tensors(model, lambda x: x.to(dtype).contiguous()))
        del model
        yield Path(name)
