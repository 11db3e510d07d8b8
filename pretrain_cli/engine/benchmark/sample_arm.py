"""One arm of `pretrain benchmark sample`, in its own process: loads a model, then generates text on
request.

pretrain            what `pretrain sample` does, without decoding tokens to text
speed.NAME=VALUE    the same with another process setting
transformers        `generate` with its own KV cache and default settings
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.evaluation.compare_transformers import import_transformers
from pretrain_cli.engine.runtime.distributed import find_device
from pretrain_cli.engine.runtime.speed import Speed, resolve_speed
from pretrain_cli.engine.sampling.batch import Completion, ContinuousBatch
from pretrain_cli.engine.sampling.sample import open_for_decoding, open_session
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.model.config import ModelConfig

OURS, THEIRS = "pretrain", "transformers"


@dataclass(frozen=True, kw_only=True)
class Workload:
    model: ModelConfig
    prompt: int
    """Tokens of each prompt."""
    tokens: int
    """Tokens generated after each prompt."""
    batch: int
    rounds: int
    device: str
    dtype: str
    """Same as speed.dtype: auto chooses by device."""
    compiled: bool | None
    settings: tuple[str, ...] = ()
    """Process settings as `speed.NAME=VALUE`."""
    vs: tuple[str, ...] = ()
    """Arms to compare with: transformers, or process settings, each applied alone."""
    quantize: str | None = None
    """int8 for our matrices; None for unquantized weights."""


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
    """Tokens of the first text."""


def settings_of(workload: Workload, arm: str) -> SpeedConfig:
    """Return the speed settings of one of our arms."""
    flags = {"speed.dtype": workload.dtype, "speed.compile": False}
    own = () if arm in (OURS, THEIRS) else (arm,)
    return build_config({}, flags, (*workload.settings, *own)).speed


def speed_of(workload: Workload, arm: str = OURS) -> Speed:
    place = find_device(workload.device)
    return resolve_speed(settings_of(workload, arm), place, training=False)


def serve_arm(arm: str, folder: Path, pipe: Connection) -> None:
    """Load the model when told the workload, then generate the requested number of tokens each
    time."""
    try:
        workload = pipe.recv()
        if arm == THEIRS:
            ready, one_round = _theirs(workload, folder)
        else:
            ready, one_round = _ours(workload, arm, folder)
        pipe.send(ready)
        while tokens := pipe.recv():
            pipe.send(one_round(tokens))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # the parent process is gone
        return
    except Exception as error:
        pipe.send(error)


def _prompts(workload: Workload) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (workload.batch, workload.prompt)
    return torch.randint(0, workload.model.vocab_size, size, generator=generator)


def _ours(workload: Workload, arm: str, folder: Path) -> tuple[Ready, Callable[[int], Round]]:
    began = time.perf_counter()
    speed = speed_of(workload, arm)
    model = open_for_decoding(
        folder,
        speed,
        find_device(workload.device),
        print,
        int8=workload.quantize is not None,
    )
    load = time.perf_counter() - began
    prompts = _prompts(workload).tolist()
    params = SamplingParams(temperature=0, max_tokens=workload.tokens)

    def texts(tokens: int) -> list[Completion]:
        return [Completion(i, ids, tokens, "max-tokens", i) for i, ids in enumerate(prompts)]

    began = time.perf_counter()
    said = speed.departures()
    writer = open_session(
        model, workload.compiled, texts(workload.tokens), workload.batch, said.append
    )

    def one_round(tokens: int) -> Round:
        began = time.perf_counter()
        batch = ContinuousBatch(
            writer,
            params,
            rows=workload.batch,
            capacity=workload.prompt + workload.tokens,
            eos=-1,
            vocab_size=workload.model.vocab_size,
        )
        asked = texts(tokens)
        first = None
        for _ in batch.run(asked):
            first = first or time.perf_counter()
        ended = time.perf_counter()
        return Round((first or ended) - began, ended - (first or ended), asked[0].tokens)

    return Ready(load, time.perf_counter() - began, said, speed.record()), one_round


def _theirs(workload: Workload, folder: Path) -> tuple[Ready, Callable[[int], Round]]:
    transformers = import_transformers("--vs transformers")
    began = time.perf_counter()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=speed_of(workload).compute_dtype, local_files_only=True
    )
    model = model.to(workload.device).eval()
    load = time.perf_counter() - began
    prompts = _prompts(workload).to(workload.device)

    def one_round(tokens: int) -> Round:
        times = []

        def clock(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            ids[0, -1].item()  # wait for the device
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
