"""Text from a model: prompts in, pieces of text out as they are made."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.engine.runs.retention import find_model_folder
from pretrain_cli.engine.runtime.distributed import find_device
from pretrain_cli.engine.runtime.speed import Speed, resolve_speed
from pretrain_cli.engine.sampling.batch import Completion, ContinuousBatch
from pretrain_cli.engine.sampling.detokenize import StopStrings, TextStream
from pretrain_cli.engine.sampling.open_model import folder_tokenizer, open_model, quantized
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.errors import ConfigError, DataError
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.hf_config import read_config
from pretrain_cli.model.inference.decode import DecodeSession
from pretrain_cli.model.inference.int8 import FEW, as_floats, is_quantized
from pretrain_cli.model.inference.int8 import quantize as quantize_model

Emit = Callable[[str], None]
CPU = torch.device("cpu")

COMPILING = 6.0
"""Seconds that compiling takes on two CPU cores for each kind of layer: 7 for one, 11 for two."""
SAVED = 0.6e-3
"""Seconds that it then saves of a layer's step, at least: 0.6 ms of one text of gemma3-tiny in
float32 (163 and 403 tokens/s), 0.9 of gemma3-270m in bfloat16 (24.8 and 42.1), by pretrain
benchmark sample with --no-compile and --compile. With several texts it's no less."""


def open_for_sampling(
    where: Path | None,
    *,
    device: str,
    dtype: str,
    emit: Emit,
    best: bool = False,
    quantize: str | None = None,
    settings: Iterable[str] = (),
) -> tuple[Path, Decoder, Tokenizer]:
    """The model and tokenizer of a run, a checkpoint or a Hugging Face folder. `settings`: as
    `speed.NAME=VALUE`."""
    place = find_device(device)
    folder = find_model_folder(where, emit, best=best)
    tokenizer = folder_tokenizer(folder)
    int8 = quantized(quantize, read_config(folder))
    if int8:
        refuse_int8_off_cpu(place)
    flags = {"speed.dtype": dtype, "speed.compile": False}
    asked = build_config({}, flags, settings).speed
    speed = resolve_speed(asked, place, training=False)
    for said in speed.departures():
        emit(said)
    return folder, open_to_write(folder, speed, place, emit, int8=int8), tokenizer


def open_to_write(
    folder: Path, speed: Speed, device: torch.device, emit: Emit, *, int8: bool = False
) -> Decoder:
    """The model of a folder, its matrices cast or quantized once, and not again at every token."""
    model = open_model(folder, speed, device, emit)
    if int8:
        quantize_model(model)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data = parameter.data.to(model.dtype)
    return model


def refuse_int8_off_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        raise ConfigError(
            f"--quantize: int8 is for writing text on a CPU, and the device is {device}; leave it "
            "out, or give --device cpu"
        )


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """New characters of a text; the last delta carries the finished completion."""

    text: Completion
    piece: str
    whole: str | None
    """All that was made of it, once it ended."""


def plan_texts(
    model: Decoder, tokenizer: Tokenizer, prompts: list[str], controls: SamplingParams, n: int = 1
) -> list[Completion]:
    """`n` texts of each prompt, in order. Raises ConfigError for a prompt that is no text, or that
    has no room behind it."""
    positions = model.config.max_position_embeddings
    texts = []
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
            texts.append(
                Completion(
                    number=len(texts),
                    prompt=ids,
                    limit=min(controls.max_tokens, room),
                    reason="max-tokens" if controls.max_tokens <= room else "positions",
                    seed=(controls.seed + len(texts)) % 2**63,
                )
            )
    return texts


def write(
    writer: DecodeSession,
    tokenizer: Tokenizer,
    texts: list[Completion],
    controls: SamplingParams,
    *,
    rows: int,
) -> Iterator[TextDelta]:
    """Pieces of all texts, each as it comes; of several they come mixed."""
    rows = min(rows, len(texts))
    generation = ContinuousBatch(
        writer,
        controls,
        rows=rows,
        capacity=max(len(text.prompt) + text.limit for text in texts),
        end=tokenizer.eos,
        known=min(tokenizer.vocab_size, writer.model.config.vocab_size),
    )
    streams = [TextStream(tokenizer, text.prompt) for text in texts]
    stops = [StopStrings(controls.stop) for _ in texts]
    whole = ["" for _ in texts]
    for text, token in generation.run(texts):
        stream, stop = streams[text.number], stops[text.number]
        piece = "" if token is None else stop.add(stream.add(token))
        if text.stopped and not stop.found:
            piece += stop.add(stream.end())
            if not stop.found:
                piece += stop.end()
        if stop.found:
            text.stopped = "stop"
        whole[text.number] += piece
        yield TextDelta(text=text, piece=piece, whole=whole[text.number] if text.stopped else None)


def sample_text(
    model: Decoder, tokenizer: Tokenizer, prompt: str, controls: SamplingParams
) -> Iterator[str]:
    """The text that follows the prompt, in pieces that are whole characters. The model is left as
    it is."""
    texts = plan_texts(model, tokenizer, [prompt], controls)
    for piece in write(DecodeSession(model), tokenizer, texts, controls, rows=1):
        if piece.piece:
            yield piece.piece


def make_writer(
    model: Decoder, asked: bool | None, texts: list[Completion], rows: int, emit: Emit
) -> DecodeSession:
    """The model made ready to write these texts; it can do nothing else afterwards. Compiles a step
    where that was asked for or pays, and says so."""
    if is_quantized(model) and (why := no_int8_steps(model, asked, min(rows, len(texts)))):
        as_floats(model)
        emit(f"The int8 weights are read as {str(model.dtype).removeprefix('torch.')}: {why}")
    compiled, reason = decide_compile(model, asked, texts, rows)
    if asked and not compiled:
        emit(f"Not compiled: {reason}")
    rows = min(rows, len(texts))
    writer = DecodeSession(model, fast=True, compiled=compiled, rows=rows)
    if compiled or is_quantized(model):
        began = time.perf_counter()
        capacity = max(len(text.prompt) + text.limit for text in texts)
        writer.warm_up(rows=rows, capacity=capacity)
        reason = reason if compiled else "products of int8"
        why = "" if asked else f" ({reason}; --no-compile leaves it out)"
        emit(f"Compiled in {time.perf_counter() - began:.0f} s{why}")
    return writer


def no_int8_steps(model: Decoder, asked: bool | None, rows: int) -> str:
    """Why steps of so many texts are taken with floats of an int8 model's values; else nothing."""
    if asked is False:
        return "products of int8 are compiled"
    if rows > FEW[model.dtype]:
        return f"with {rows} texts at a time that is faster (up to {FEW[model.dtype]}, int8 is)"
    possible = resolve_speed(SpeedConfig(compile=True), CPU, training=False).decisions["compile"]
    return "" if possible.in_force else f"{possible.reason}, which products of int8 need"


def decide_compile(
    model: Decoder, asked: bool | None, texts: list[Completion], rows: int
) -> tuple[bool, str]:
    """(whether to compile a step, why). Without being asked, on a GPU, and on a CPU where so many
    steps could be needed that it pays."""
    if asked is False:
        return False, ""
    device = model.embedding.weight.device
    possible = resolve_speed(SpeedConfig(compile=True), device, training=False).decisions["compile"]
    if not possible.in_force:
        return False, possible.reason
    if model.config.num_experts and model.dtype == torch.float32:
        return False, "PyTorch doesn't compile products of experts in float32"
    if asked or device.type != "cpu":
        return True, "steps are short, and what starts them is saved"
    steps = sum(text.limit for text in texts) / min(rows, len(texts))
    if steps < worth_compiling(model.config):
        return False, "the text is short"
    return True, f"up to {steps:,.0f} steps"


def worth_compiling(config: ModelConfig) -> float:
    """Steps from which compiling pays on a CPU, for one text or several."""
    return COMPILING * len(set(config.layer_types)) / (SAVED * config.num_hidden_layers)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: of a .jsonl file each line's "prompt", of any other the lines themselves.
    Empty lines are passed over."""
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
