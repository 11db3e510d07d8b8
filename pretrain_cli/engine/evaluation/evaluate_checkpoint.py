"""A run's own validation, on any checkpoint or model folder and any dataset of its tokenizer.

What is not asked for is as in the run that the checkpoint is of: its datasets, the length of its
samples, its document mask, its backend and compute type. So a checkpoint has the loss that
metrics.jsonl has for its step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain_cli.config.build import build_config
from pretrain_cli.data.mixture import Mixture
from pretrain_cli.engine.planning.data_and_model import check_tokenizer, open_mixture
from pretrain_cli.engine.runs.events import Evaluation
from pretrain_cli.engine.runs.retention import find_model_folder
from pretrain_cli.engine.runtime.distributed import open_ranks
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.engine.sampling.open_model import open_model, run_of, wants_int8
from pretrain_cli.engine.training.evaluate import evaluate
from pretrain_cli.errors import CheckpointError, ConfigError, DataError
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.formats.hf_config import read_config
from pretrain_cli.model.inference.int8 import as_floats, quantize

TOKENS_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class Request:
    """Input of an evaluation. None means as in the checkpoint's run, or by the device."""

    where: Path | None = None
    best: bool = False
    """Use a run's checkpoint with the lowest validation loss instead of the newest."""
    data: tuple[str, ...] | None = None
    tokenizer: str | None = None
    eval_tokens: int | None = None
    """Number of first targets to evaluate in each dataset; None means all."""
    seq_len: int | None = None
    document_mask: bool | None = None
    device: str = "auto"
    dtype: str | None = None
    attention: str | None = None
    compile: bool | None = None
    quantize: str | None = None
    """int8: evaluate the weights as they are, and then in int8."""
    settings: tuple[str, ...] = ()
    """Speed settings as `speed.NAME=VALUE`."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of an evaluation, and the settings in force."""

    folder: Path
    data: str
    seq_len: int
    document_mask: bool
    dtype: str
    attention: str
    evaluation: Evaluation
    quantize: str | None = None
    unquantized: Evaluation | None = None


def evaluate_checkpoint(request: Request, notify: Callable[[str], None]) -> Result | None:
    """Evaluate; None on every rank but the first, which has the result of all."""
    for name, value in (("eval-tokens", request.eval_tokens), ("seq-len", request.seq_len)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: {value} is not at least 1")
    with open_ranks(request.device) as ranks:
        say = notify if ranks.is_first else _silent
        folder = find_model_folder(request.where, say, best=request.best)
        settings = as_in_its_run(folder)
        flags = {
            "data.path": request.data,
            "data.tokenizer": request.tokenizer,
            "data.seq_len": request.seq_len,
            "data.document_mask": request.document_mask,
            "train.eval_tokens": request.eval_tokens,
            "speed.dtype": request.dtype,
            "speed.attention": request.attention,
            "speed.compile": request.compile,
        }
        if request.data is not None:
            settings["data"].pop("tokenizer", None)  # which says what made the run's own files
        asked = build_config(settings, flags, request.settings)
        if asked.data.path is None:
            raise ConfigError(f"--data: {folder} is of no run that names one; give a dataset")
        data = open_mixture(asked.data.path, asked.data.tokenizer, say)
        if asked.train.eval_tokens is not None:
            data = data.validated_on(asked.train.eval_tokens)
        config = read_config(folder)
        check_tokenizer(folder, data, say)
        seq_len = _seq_len(config, data, asked.data.seq_len, ranks.device)
        speed = resolve_speed(asked.speed, ranks.device, training=False)
        for said in speed.departures():
            say(said)
        int8 = wants_int8(request.quantize, config)
        model = open_model(folder, speed, ranks.device, say)

        def measured() -> Evaluation:
            found = evaluate(
                model,
                data,
                step=0,
                seq_len=seq_len,
                batch_size=max(1, TOKENS_AT_ONCE // seq_len),
                ranks=ranks,
                document_mask=asked.data.document_mask,
            )
            return _checked(found, folder, data)

        evaluation, unquantized = measured(), None
        if int8:
            quantize(model)
            as_floats(model)
            evaluation, unquantized = measured(), evaluation
        if not ranks.is_first:
            return None
        return Result(
            folder=folder,
            data=data.name,
            seq_len=seq_len,
            document_mask=asked.data.document_mask,
            dtype=speed.dtype,
            attention=speed.attention,
            evaluation=evaluation,
            quantize=request.quantize,
            unquantized=unquantized,
        )


def _checked(evaluation: Evaluation | None, folder: Path, data: Mixture) -> Evaluation:
    if evaluation is None:
        raise DataError(f"{data.name}: no validation split; tokenize with --val-fraction above 0")
    if not math.isfinite(evaluation.loss):
        raise CheckpointError(
            f"{folder}: its loss is {evaluation.loss}: its training diverged; take an earlier "
            "checkpoint"
        )
    return evaluation


def as_in_its_run(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of a checkpoint's run that its validation depends on."""
    found = run_of(folder)
    if found is None:
        return {"data": {}, "speed": {"compile": False}}
    settings = found[1].settings
    data = {key: settings["data"][key] for key in ("path", "tokenizer", "seq_len", "document_mask")}
    speed = {key: settings["speed"][key] for key in ("attention", "dtype", "float32_matmul")}
    if speed["dtype"] == "float8":  # a way to train; what it validates it computes in this
        speed["dtype"] = "bfloat16"
    train = {"eval_tokens": settings["train"].get("eval_tokens")}
    return {"data": data, "speed": {**speed, "compile": False}, "train": train}


def _seq_len(config: ModelConfig, data: Mixture, asked: int | str, device: torch.device) -> int:
    """Tokens a window; refuse what the model has no positions or no rows for."""
    positions = config.max_position_embeddings
    if config.vocab_size <= data.largest_token:
        raise DataError(
            f"{data.name}: holds token {data.largest_token:,}, and the model has "
            f"{config.vocab_size:,}; tokenize for this model"
        )
    if asked == "auto":
        return min(512 if device.type == "cpu" else 1024, positions)
    assert isinstance(asked, int)
    if asked > positions:
        raise ConfigError(
            f"--seq-len: {asked:,} is beyond the model's {positions:,} positions; give less"
        )
    return asked


def _silent(text: str) -> None:
    """Ignore a message; for ranks other than the first."""
