"""Generate text with a model: prompts in, pieces of text out as they are sampled."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain_cli.compilers import uncompiled_experts
from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.engine.runs.retention import find_model_folder
from pretrain_cli.engine.runtime.distributed import find_device
from pretrain_cli.engine.runtime.speed import Speed, resolve_speed
from pretrain_cli.engine.sampling.batch import Completion, ContinuousBatch
from pretrain_cli.engine.sampling.detokenize import StopStrings, TextStream
from pretrain_cli.engine.sampling.open_model import folder_tokenizer, open_model, wants_int8
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.errors import ConfigError, DataError
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.hf_config import read_config
from pretrain_cli.model.inference.decode import DecodeSession
from pretrain_cli.model.inference.int8 import FEW, as_floats, is_quantized
from pretrain_cli.model.inference.int8 import quantize as quantize_model

Notify = Callable[[str], None]
CPU = torch.device("cpu")

COMPILE_SECONDS = 6.0
"""Compile time for each kind of layer; seconds. Measured on two CPU cores: 7 s for one kind of
layer, 11 s for two."""
SECONDS_SAVED = 0.6e-3
"""Time that compiling saves in each layer of a step; seconds, a lower bound. By `pretrain benchmark
sample` with --no-compile and --compile, one text: 0.6 ms for gemma3-tiny in float32 (163 and 403
tokens/s), 0.9 ms for gemma3-270m in bfloat16 (24.8 and 42.1). Several texts save no less."""


def open_for_sampling(
    where: Path | None,
    *,
    device: str,
    dtype: str,
    notify: Notify,
    best: bool = False,
    quantize: str | None = None,
    settings: Iterable[str] = (),
) -> tuple[Path, Decoder, Tokenizer]:
    """Open the folder, model and tokenizer of a run, a checkpoint or a Hugging Face folder.
    `settings`: speed settings as `speed.NAME=VALUE`."""
    torch_device = find_device(device)
    folder = find_model_folder(where, notify, best=best)
    tokenizer = folder_tokenizer(folder)
    int8 = wants_int8(quantize, read_config(folder))
    if int8:
        refuse_int8_off_cpu(torch_device)
    flags = {"speed.dtype": dtype, "speed.compile": False}
    requested = build_config({}, flags, settings).speed
    speed = resolve_speed(requested, torch_device, training=False)
    for message in speed.departures():
        notify(message)
    model = open_for_decoding(folder, speed, torch_device, notify, int8=int8)
    return folder, model, tokenizer


def open_for_decoding(
    folder: Path, speed: Speed, device: torch.device, notify: Notify, *, int8: bool = False
) -> Decoder:
    """Open a folder's model. Casts or quantizes its matrices once, instead of at every token."""
    model = open_model(folder, speed, device, notify)
    if int8:
        quantize_model(model)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data = parameter.data.to(model.dtype)
    return model


def refuse_int8_off_cpu(device: torch.device) -> None:
    """Raise ConfigError for a device without int8 products."""
    if device.type != "cpu":
        raise ConfigError(
            f"--quantize: int8 is for writing text on a CPU, and the device is {device}; leave it "
            "out, or give --device cpu"
        )


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """New characters of a completion."""

    completion: Completion
    text: str
    full_text: str | None
    """All text of the completion; None until it ends."""


def plan_completions(
    model: Decoder, tokenizer: Tokenizer, prompts: list[str], params: SamplingParams, n: int = 1
) -> list[Completion]:
    """Return `n` completions to generate for each prompt, in order. Raises ConfigError for a prompt
    that is not Unicode text, or that fills the model's positions."""
    positions = model.config.max_position_embeddings
    completions = []
    for number, prompt in enumerate(prompts):
        which = "" if len(prompts) == 1 else f" (number {number + 1})"
        if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ConfigError(
                f"--prompt{which}: not UTF-8, or half of a character; give whole text"
            )
        ids = tokenizer.encode_prompt(prompt)
        room = positions - len(ids)
        if room < 1:
            raise ConfigError(
                f"--prompt{which}: its {len(ids):,} tokens fill the model's {positions:,} "
                "positions; shorten it"
            )
        for _ in range(n):
            completions.append(
                Completion(
                    number=len(completions),
                    prompt=ids,
                    limit=min(params.max_tokens, room),
                    reason="max-tokens" if params.max_tokens <= room else "positions",
                    seed=(params.seed + len(completions)) % 2**63,
                )
            )
    return completions


def generate_text(
    session: DecodeSession,
    tokenizer: Tokenizer,
    completions: list[Completion],
    params: SamplingParams,
    *,
    rows: int,
) -> Iterator[TextDelta]:
    """Yield the text of all completions as it is sampled, `rows` of them at a time, interleaved."""
    batch = ContinuousBatch(
        session,
        params,
        rows=min(rows, len(completions)),
        capacity=_capacity(completions),
        eos=tokenizer.eos,
        vocab_size=min(tokenizer.vocab_size, session.model.config.vocab_size),
    )
    streams = [TextStream(tokenizer, completion.prompt) for completion in completions]
    stops = [StopStrings(params.stop) for _ in completions]
    full_texts = ["" for _ in completions]
    for completion, token in batch.run(completions):
        number = completion.number
        stream, stop = streams[number], stops[number]
        text = "" if token is None else stop.add(stream.add(token))
        if completion.stopped and not stop.found:
            text += stop.add(stream.end())
            if not stop.found:
                text += stop.end()
        if stop.found:
            completion.stopped = "stop"
        full_texts[number] += text
        full_text = full_texts[number] if completion.stopped else None
        yield TextDelta(completion=completion, text=text, full_text=full_text)


def sample_text(
    model: Decoder, tokenizer: Tokenizer, prompt: str, params: SamplingParams
) -> Iterator[str]:
    """Yield a continuation of the prompt in pieces of whole characters. The model is unchanged."""
    completions = plan_completions(model, tokenizer, [prompt], params)
    for delta in generate_text(DecodeSession(model), tokenizer, completions, params, rows=1):
        if delta.text:
            yield delta.text


def open_session(
    model: Decoder,
    compile_: bool | None,
    completions: list[Completion],
    rows: int,
    notify: Notify,
) -> DecodeSession:
    """Prepare the model for generating these completions; afterwards it can do nothing else.
    `compile_`: whether to compile a step; None lets `decide_compile` choose."""
    rows = min(rows, len(completions))
    if is_quantized(model) and (why := no_int8_steps(model, compile_, rows)):
        as_floats(model)
        notify(f"The int8 weights are read as {str(model.dtype).removeprefix('torch.')}: {why}")
    compiled, reason = decide_compile(model, compile_, completions, rows)
    if compile_ and not compiled:
        notify(f"Not compiled: {reason}")
    session = DecodeSession(model, fast=True, compiled=compiled, rows=rows)
    if compiled or is_quantized(model):
        began = time.perf_counter()
        session.warm_up(rows=rows, capacity=_capacity(completions))
        reason = reason if compiled else "int8 products"
        why = "" if compile_ else f" ({reason}; --no-compile leaves it out)"
        notify(f"Compiled in {time.perf_counter() - began:.0f} s{why}")
    return session


def _capacity(completions: list[Completion]) -> int:
    """Return the tokens of the longest completion with its prompt."""
    return max(len(completion.prompt) + completion.limit for completion in completions)


def no_int8_steps(model: Decoder, compile_: bool | None, rows: int) -> str:
    """Return the reason to compute an int8 model's steps of `rows` texts in floats; empty if int8
    products are to be used."""
    if compile_ is False:
        return "int8 products are always compiled"
    if rows > FEW[model.dtype]:
        return f"with {rows} texts at a time that is faster (up to {FEW[model.dtype]}, int8 is)"
    possible = resolve_speed(SpeedConfig(compile=True), CPU, training=False).decisions["compile"]
    return "" if possible.in_force else f"{possible.reason}, which int8 products need"


def decide_compile(
    model: Decoder, requested: bool | None, completions: list[Completion], rows: int
) -> tuple[bool, str]:
    """Return whether to compile a step, and why. If `requested` is None: compile on a GPU; on a
    CPU, compile if the completions may take at least `worth_compiling` steps. Never compile where
    torch.compile is unavailable, or a mixture of experts in float32."""
    if requested is False:
        return False, ""
    device = model.embedding.weight.device
    possible = resolve_speed(SpeedConfig(compile=True), device, training=False).decisions["compile"]
    if not possible.in_force:
        return False, possible.reason
    if why := uncompiled_experts(model.config.num_experts, str(model.dtype).removeprefix("torch.")):
        return False, why
    if requested or device.type != "cpu":
        return True, "starting the operations of a step takes longer than computing them"
    steps = sum(completion.limit for completion in completions) / min(rows, len(completions))
    if steps < worth_compiling(model.config):
        return False, "the text is short"
    return True, f"up to {steps:,.0f} steps"


def worth_compiling(config: ModelConfig) -> float:
    """Return the number of steps at which compiling saves as much time as it costs on a CPU. It is
    used for any number of texts at a time."""
    return (
        COMPILE_SECONDS * len(set(config.layer_types)) / (SECONDS_SAVED * config.num_hidden_layers)
    )


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file: each line's "prompt" in a .jsonl file, else the lines themselves.
    Empty lines are skipped. Raises DataError for a file that can't be read or holds no prompt."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"--prompts: {path}: {reason}; give a file with a prompt a line") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str):
            raise DataError(f'{path}, line {number}: no text as "prompt"; give {{"prompt": "…"}}')
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"--prompts: {path} holds none; give one a line")
    return prompts
