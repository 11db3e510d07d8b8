"""How fast text is written: a prompt's prefill, then tokens one after the other, greedily.

    pretrain            what `pretrain sample` does (engine/generate.py), its texts not decoded
    speed.NAME=VALUE    the same with another setting of its process
    transformers        `generate` with its own KV cache, as it comes

Each in a fresh process with the same random weights; what ours sets for its process, transformers'
is without. They take turns, so that a machine that is busy for a while is so for both; loading,
compiling and one round to warm up are timed apart.

What can be reached is a matter of memory: every token reads all weights and what its text has
remembered. The limit is the rate at which this machine copies a large buffer, read and written
bytes both counted, over those bytes.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pretrain_cli.config import SpeedConfig, build_config
from pretrain_cli.engine.benchmark.fresh import serve
from pretrain_cli.engine.choosing import Controls
from pretrain_cli.engine.distributed import find_device
from pretrain_cli.engine.generate import Generation, Text
from pretrain_cli.engine.open_model import quantized
from pretrain_cli.engine.process import check_process_settings
from pretrain_cli.engine.sample import make_writer, open_to_write, refuse_int8_off_cpu
from pretrain_cli.engine.speed import Speed, build_model, resolve_speed
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.config_json import to_config_json
from pretrain_cli.model.counting import cache_bytes, count_parameters
from pretrain_cli.model.huggingface import published_tensors, write_weights

OURS, THEIRS = "pretrain", "transformers"
WARM_UP = 8
"""Tokens of the round that does not count."""
COPIED = 2**28
"""Bytes of the buffer that is copied to see the memory's rate: far more than a cache holds."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    model: ModelConfig
    prompt: int
    """Tokens of each prompt."""
    tokens: int
    """Written behind each."""
    batch: int
    rounds: int
    device: str
    dtype: str
    """As speed.dtype: auto is what suits the device."""
    compiled: bool | None
    settings: tuple[str, ...] = ()
    """Of the process, as `speed.NAME=VALUE`."""
    vs: tuple[str, ...] = ()
    """transformers, or such settings, each by itself beside those."""
    quantize: str | None = None
    """int8 for our own matrices, None for the weights as they are."""


class Ready(NamedTuple):
    load: float
    compile: float
    said: list[str]
    speed: dict[str, Any]
    """Our settings as asked and as in force."""


class Round(NamedTuple):
    prefill: float
    """Seconds until the first token of every text."""
    decode: float
    """Seconds for the others."""
    tokens: list[int]
    """Of the first text."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One arm's; medians over the rounds."""

    arm: str
    load_seconds: float
    compile_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    share_of_limit: float
    ratio: float | None
    """Our decode rate over this arm's, the median of the rounds; None for our own."""
    agreed: int | None
    """Tokens of the first text up to the first that differs from ours."""
    rounds: list[tuple[float, float]]
    """Prefill and decode rates of each."""
    said: list[str]
    speed: dict[str, Any]
    """Our settings as asked and as in force; none of transformers'."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All arms' results, and what they are measured by."""

    results: list[Result]
    step_bytes: float
    copy_rate: float
    """Bytes a second, read and written."""
    limit: float
    """Tokens a second of the whole batch, if a step took what reading takes."""


def measure(workload: Workload, progress: Callable[[str], None]) -> Measured:
    """Our rates, and those of the arms it is measured against."""
    for arm in workload.vs:
        if arm != THEIRS and not arm.startswith("speed."):
            raise ConfigError(f"--vs: '{arm}' is not {THEIRS}, and not speed.NAME=VALUE")
    check_process_settings("--vs", (arm for arm in workload.vs if arm != THEIRS))
    if quantized(workload.quantize, workload.model):
        refuse_int8_off_cpu(find_device(workload.device))
    arms = [OURS, *dict.fromkeys(workload.vs)]
    turns: dict[str, list[Round]] = {arm: [] for arm in arms}
    ready = {}
    progress("drawing weights")
    with _drawn_folder(workload) as folder, _processes(workload, arms, folder) as pipes:
        for arm, pipe in pipes.items():  # one at a time, so that neither loads while one compiles
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
    """What a step reads: the weights that a token meets, and what texts remember on average."""
    config = workload.model
    size = _speed(workload).compute_dtype.itemsize
    count = count_parameters(config)
    matrices = count.active - (0 if config.tie_word_embeddings else count.embeddings)
    middle = workload.prompt + workload.tokens // 2
    each = size if workload.quantize is None else 1
    return each * matrices + workload.batch * cache_bytes(config, middle, size)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of the fastest of some copies."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # waits for the device
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
) -> Iterator[dict[str, Connection]]:
    """A fresh process for each arm, and the pipe that it is asked by."""
    fresh = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    try:
        for arm in arms:
            pipes[arm], theirs = fresh.Pipe()
            ours = None if arm == THEIRS else _asked(workload, arm)
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


def serve_arm(arm: str, folder: Path, pipe: Connection) -> None:
    """Load when told what is measured, then write so many tokens whenever told to."""
    try:
        workload = pipe.recv()
        if arm == THEIRS:
            ready, one_round = _theirs(workload, folder)
        else:
            ready, one_round = _ours(workload, arm, folder)
        pipe.send(ready)
        while tokens := pipe.recv():
            pipe.send(one_round(tokens))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:
        pipe.send(error)


@contextmanager
def _drawn_folder(workload: Workload) -> Iterator[Path]:
    """A model folder with random weights in the compute type, which goes away again."""
    speed = _speed(workload)
    model = build_model(workload.model, speed, torch.device("cpu"))
    model.initialize(0)
    dtype = speed.compute_dtype
    with tempfile.TemporaryDirectory(prefix="pretrain-benchmark-") as name:
        raw = to_config_json(workload.model, str(dtype).removeprefix("torch."))
        Path(name, "config.json").write_text(json.dumps(raw))
        write_weights(Path(name), published_tensors(model, lambda x: x.to(dtype).contiguous()))
        del model
        yield Path(name)


def _asked(workload: Workload, arm: str) -> SpeedConfig:
    """What one of our arms is to have."""
    flags = {"speed.dtype": workload.dtype, "speed.compile": False}
    own = () if arm in (OURS, THEIRS) else (arm,)
    return build_config({}, flags, (*workload.settings, *own)).speed


def _speed(workload: Workload, arm: str = OURS) -> Speed:
    place = find_device(workload.device)
    return resolve_speed(_asked(workload, arm), place, training=False, writing=True)


def _prompts(workload: Workload) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (workload.batch, workload.prompt)
    return torch.randint(0, workload.model.vocab_size, size, generator=generator)


def _ours(workload: Workload, arm: str, folder: Path) -> tuple[Ready, Callable[[int], Round]]:
    began = time.perf_counter()
    speed = _speed(workload, arm)
    model = open_to_write(
        folder,
        speed,
        find_device(workload.device),
        print,
        int8=workload.quantize is not None,
    )
    load = time.perf_counter() - began
    prompts = _prompts(workload).tolist()
    controls = Controls(temperature=0, max_tokens=workload.tokens)

    def texts(tokens: int) -> list[Text]:
        return [Text(i, ids, tokens, "max-tokens", i) for i, ids in enumerate(prompts)]

    began = time.perf_counter()
    said = speed.departures()
    writer = make_writer(
        model, workload.compiled, texts(workload.tokens), workload.batch, said.append
    )

    def one_round(tokens: int) -> Round:
        began = time.perf_counter()
        generation = Generation(
            writer,
            controls,
            rows=workload.batch,
            capacity=workload.prompt + workload.tokens,
            end=-1,
            known=workload.model.vocab_size,
        )
        asked = texts(tokens)
        first = None
        for _ in generation.run(asked):
            first = first or time.perf_counter()
        ended = time.perf_counter()
        return Round((first or ended) - began, ended - (first or ended), asked[0].tokens)

    return Ready(load, time.perf_counter() - began, said, speed.record()), one_round


def _theirs(workload: Workload, folder: Path) -> tuple[Ready, Callable[[int], Round]]:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "--vs transformers: it is not installed; pip install 'pretrain[verify]'"
        ) from None
    began = time.perf_counter()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=_speed(workload).compute_dtype, local_files_only=True
    )
    model = model.to(workload.device).eval()
    load = time.perf_counter() - began
    prompts = _prompts(workload).to(workload.device)

    def one_round(tokens: int) -> Round:
        times = []

        def clock(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            ids[0, -1].item()  # waits for the device
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        began = time.perf_counter()
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
        return Round(times[0] - began, times[-1] - times[0], out[0, workload.prompt :].tolist())

    return Ready(load, 0.0, [f"transformers {transformers.__version__}"], {}), one_round
