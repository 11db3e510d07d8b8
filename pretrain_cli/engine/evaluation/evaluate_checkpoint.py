"""Evaluate any checkpoint or model folder on any dataset of its tokenizer, as validation does.

Settings that are not given come from the checkpoint's run: datasets, sample length, document mask,
attention backend and compute type. So a checkpoint gets the same loss as metrics.jsonl records for
its step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain_cli.config.build import build_config
from pretrain_cli.data.mixture import Mixture
from pretrain_cli.engine.planning.data_and_model import open_mixture
from pretrain_cli.engine.planning.vocabulary import check_tokenizer
from pretrain_cli.engine.runs.events import Evaluation
from pretrain_cli.engine.runs.retention import find_model_folder
from pretrain_cli.engine.runtime.distributed import open_ranks
from pretrain_cli.engine.runtime.speed import hides_keys, resolve_speed
from pretrain_cli.engine.sampling.open_model import open_model, run_of, wants_int8
from pretrain_cli.engine.training.evaluate import evaluate
from pretrain_cli.errors import CheckpointError, ConfigError, DataError
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.formats.hf_config import read_config
from pretrain_cli.model.inference.int8 import as_floats, quantize

BATCH_TOKENS = 8192
"""Tokens in a batch."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """Inputs of an evaluation. None: the setting of the checkpoint's run, else the device's default
    (unless the field says otherwise)."""

    where: Path | None = None
    best: bool = False
    """Use a run's checkpoint with the lowest validation loss instead of the newest."""
    data: tuple[str, ...] | None = None
    tokenizer: str | None = None
    eval_tokens: int | None = None
    """Number of targets to evaluate, from the start of each dataset's validation split; None: the
    run's number, or all."""
    seq_len: int | None = None
    document_mask: bool | None = None
    device: str = "auto"
    dtype: str | None = None
    attention: str | None = None
    compile: bool | None = None
    quantize: str | None = None
    """int8 evaluates the weights unchanged and then in int8; None evaluates them unchanged only."""
    settings: tuple[str, ...] = ()
    """Speed settings as `speed.NAME=VALUE`."""


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Measures of an evaluation, and the settings in force. With `quantize`, `evaluation` measures
    the int8 weights and `unquantized` the unchanged ones."""

    folder: Path
    data: str
    seq_len: int
    document_mask: bool
    dtype: str
    attention: str
    evaluation: Evaluation
    quantize: str | None = None
    unquantized: Evaluation | None = None


def evaluate_checkpoint(
    request: EvaluateRequest, notify: Callable[[str], None]
) -> EvaluateResult | None:
    """Evaluate a checkpoint. Every rank must call this; all but the first return None. Raises
    ConfigError for wrong settings, DataError for an unsuitable dataset, and CheckpointError for a
    broken model folder or a loss that is not finite."""
    for name, value in (("eval-tokens", request.eval_tokens), ("seq-len", request.seq_len)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: {value} is not at least 1")
    with open_ranks(request.device) as ranks:
        notify = notify if ranks.is_first else _silent
        folder = find_model_folder(request.where, notify, best=request.best)
        settings = run_settings(folder)
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
            settings["data"].pop("tokenizer", None)  # it describes the run's own .bin files
        config = build_config(settings, flags, request.settings)
        if config.data.path is None:
            raise ConfigError(f"--data: {folder} belongs to no run that names one; give a dataset")
        data = open_mixture(config.data.path, config.data.tokenizer, notify)
        if config.train.eval_tokens is not None:
            data = data.validated_on(config.train.eval_tokens)
        model_config = read_config(folder)
        check_tokenizer(folder, data, notify)
        seq_len = _seq_len(model_config, data, config.data.seq_len, ranks.device)
        masked = hides_keys(model_config, seq_len, documents=config.data.document_mask)
        speed = resolve_speed(
            config.speed, ranks.device, training=False, model=model_config, is_masked=masked
        )
        for message in speed.departures():
            notify(message)
        int8 = wants_int8(request.quantize, model_config)
        model = open_model(folder, speed, ranks.device, notify)

        def measure() -> Evaluation:
            evaluation = evaluate(
                model,
                data,
                step=0,
                seq_len=seq_len,
                batch_size=max(1, BATCH_TOKENS // seq_len),
                ranks=ranks,
                document_mask=config.data.document_mask,
            )
            return _checked(evaluation, folder, data)

        evaluation, unquantized = measure(), None
        if int8:
            quantize(model)
            as_floats(model)
            evaluation, unquantized = measure(), evaluation
        if not ranks.is_first:
            return None
        return EvaluateResult(
            folder=folder,
            data=data.name,
            seq_len=seq_len,
            document_mask=config.data.document_mask,
            dtype=speed.dtype,
            attention=speed.attention,
            evaluation=evaluation,
            quantize=request.quantize,
            unquantized=unquantized,
        )


def _checked(evaluation: Evaluation | None, folder: Path, data: Mixture) -> Evaluation:
    """Return the evaluation. Raises DataError if there is no validation split, CheckpointError if
    the loss is not finite."""
    if evaluation is None:
        raise DataError(f"{data.name}: no validation split; tokenize with --val-fraction above 0")
    if not math.isfinite(evaluation.loss):
        raise CheckpointError(
            f"{folder}: its loss is {evaluation.loss}: its training diverged; take an earlier "
            "checkpoint"
        )
    return evaluation


def run_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the run's settings that the validation loss depends on, or defaults for a folder that
    belongs to no run."""
    run = run_of(folder)
    if run is None:
        return {"data": {}, "speed": {"compile": False}}
    settings = run[1].settings
    data = {key: settings["data"][key] for key in ("path", "tokenizer", "seq_len", "document_mask")}
    speed = {key: settings["speed"][key] for key in ("attention", "dtype", "float32_matmul")}
    if speed["dtype"] == "float8":  # float8 is for training; validation computes in bfloat16
        speed["dtype"] = "bfloat16"
    train = {"eval_tokens": settings["train"].get("eval_tokens")}
    return {"data": data, "speed": {**speed, "compile": False}, "train": train}


def _seq_len(config: ModelConfig, data: Mixture, requested: int | str, device: torch.device) -> int:
    """Return the sample length. Raises ConfigError for a length beyond the model's positions,
    DataError for token ids beyond its vocabulary."""
    positions = config.max_position_embeddings
    if config.vocab_size <= data.largest_token:
        raise DataError(
            f"{data.name}: holds token {data.largest_token:,}, and the model has "
            f"{config.vocab_size:,}; tokenize for this model"
        )
    if requested == "auto":
        return min(512 if device.type == "cpu" else 1024, positions)
    assert isinstance(requested, int)
    if requested > positions:
        raise ConfigError(
            f"--seq-len: {requested:,} is beyond the model's {positions:,} positions; give less"
        )
    return requested


def _silent(text: str) -> None:
    """Ignore a message; for ranks other than the first."""
