"""Slot `decode`: greedy text from qwen3-0.6b, one and 32 at a time, beside transformers' generate.

All open the same folder of random weights in this process, and take turns: ours, ours compiled,
and transformers'. A text's first token ends its prefill; the others are decoding.
"""

import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu.check import Check
from gpu.shapes import model_of
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.evaluation.compare_transformers import import_transformers
from pretrain_cli.engine.runtime.distributed import find_device
from pretrain_cli.engine.runtime.speed import build_model, resolve_speed
from pretrain_cli.engine.sampling.batch import Completion, ContinuousBatch
from pretrain_cli.engine.sampling.sample import open_for_decoding, open_session
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.hf_config import to_config_json
from pretrain_cli.model.formats.hf_weights import published_tensors, write_weights

MODEL = "qwen3-0.6b"
BATCHES = (1, 32)
ROUNDS = 3
SECONDS, COMPILED_S = 8.0, 20.0
"""Seconds of a batch, and of compiling its step with a filled cache."""
OURS, COMPILED, THEIRS = "pretrain", "pretrain, compiled", "transformers"

Generate = Callable[[int], tuple[float, float]]
"""new tokens of each text -> seconds of the prefill, and of the other tokens."""


def run(check: Check) -> None:
    device = find_device(check.device)
    config = model_of(MODEL, check)
    prompt, tokens = (8, 6) if check.rehearse else (128, 64)
    speed = resolve_speed(SpeedConfig(compile=False), device, training=False)
    folder = write_model(
        config, speed, device, check.scratch / f"decode{'-early' * check.compile_only}"
    )
    theirs = None
    if not check.compile_only and importlib.util.find_spec("transformers"):
        hf = import_transformers("decode")
        theirs = hf.AutoModelForCausalLM.from_pretrained(
            folder, dtype=speed.compute_dtype, local_files_only=True
        )
        theirs = theirs.to(device).eval()
    for batch in BATCHES:
        name = f"{MODEL}, batch {batch}, prompt {prompt}"
        prompts = torch.randint(0, config.vocab_size, (batch, prompt))
        sides: dict[str, Generate] = {}
        # On a CPU compiling takes half a minute: a rehearsal does it once.
        if (batch == 1 or not check.rehearse) and check.fits(f"{name}, {COMPILED}", COMPILED_S):
            with check.arm(f"{name}, {COMPILED}"):
                ours = open_for_decoding(folder, speed, device, print)  # a session keeps it
                sides[COMPILED] = our_rounds(ours, prompts, tokens, compiled=True)
        if not check.compile_only and check.fits(name, SECONDS):
            with check.arm(name):
                ours = open_for_decoding(folder, speed, device, print)
                sides[OURS] = our_rounds(ours, prompts, tokens, compiled=False)
                if theirs is not None:
                    sides[THEIRS] = their_rounds(theirs, prompts.to(device))
                compare(check, name, sides, batch, prompt, tokens)


def compare(
    check: Check, name: str, sides: dict[str, Generate], batch: int, prompt: int, tokens: int
) -> None:
    """Run all sides in turns, and write the medians of their rates. A side that fails ends."""
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for number in range(-1, 1 if check.rehearse else ROUNDS):
        for side in list(sides):
            ended = True
            with check.arm(f"{name}, {side}"):
                times = sides[side](tokens)
                ended = False
                if number >= 0:
                    found[side].append(times)
            if ended:
                del sides[side], found[side]
    for side, times in found.items():
        prefill = statistics.median(first for first, _ in times)
        decode = statistics.median(rest for _, rest in times)
        figures: dict[str, Any] = {
            "prefill_tokens_per_s": batch * prompt / prefill,
            "decode_tokens_per_s": batch * (tokens - 1) / decode,
            "token_median_ms": 1e3 * decode / (tokens - 1),
            "new_tokens": tokens,
            "rounds_s": times,
        }
        for ours, ratio in ((OURS, "speed_ratio"), (COMPILED, "compiled_speed_ratio")):
            if side == THEIRS and ours in found:
                pairs = zip(found[ours], times, strict=True)
                figures[ratio] = statistics.median(b[1] / a[1] for a, b in pairs)
                figures["note"] = "decoding rate of ours divided by theirs"
        check.write(f"{name}, {side}", ok=None, **figures)


def write_model(config: ModelConfig, speed: Any, device: torch.device, folder: Path) -> Path:
    """Write a model folder of random weights in the compute type."""
    model = build_model(config, speed, device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    folder.mkdir()
    dtype = speed.compute_dtype
    raw = to_config_json(config, str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(raw))
    write_weights(folder, published_tensors(model, lambda x: x.to("cpu", dtype).contiguous()))
    return folder


def our_rounds(model: Decoder, prompts: torch.Tensor, tokens: int, *, compiled: bool) -> Generate:
    rows, length = prompts.shape
    params = SamplingParams(temperature=0, max_tokens=tokens)

    def texts(count: int) -> list[Completion]:
        return [
            Completion(i, ids, count, "max-tokens", i) for i, ids in enumerate(prompts.tolist())
        ]

    session = open_session(model, compiled, texts(tokens), rows, print)

    def generate(count: int) -> tuple[float, float]:
        began = time.perf_counter()
        batch = ContinuousBatch(
            session,
            params,
            rows=rows,
            capacity=length + tokens,
            eos=-1,
            vocab_size=model.config.vocab_size,
        )
        first = 0.0
        for _ in batch.run(texts(count)):
            first = first or time.perf_counter()
        ended = time.perf_counter()
        return (first or ended) - began, ended - (first or ended)

    return generate


def their_rounds(model: Any, prompts: torch.Tensor) -> Generate:
    transformers = import_transformers("decode")

    def generate(count: int) -> tuple[float, float]:
        times: list[float] = []

        def clock(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            ids[0, -1].item()  # wait for the device
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        began = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
        if len(times) != count:
            raise RuntimeError(f"transformers made {len(times)} tokens instead of {count}")
        return times[0] - began, times[-1] - times[0]

    return generate
