"""Export a model folder to publish: weights of one type in shards, tokenizer, configuration, model
card. The export is written to a staging folder, which is then renamed, so it is complete or absent.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.engine.export.model_card import model_card
from pretrain_cli.engine.runs.retention import find_model_folder, step_of
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.engine.sampling.open_model import folder_tokenizer, open_model, run_of
from pretrain_cli.errors import ConfigError
from pretrain_cli.files import write_whole
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.formats.hf_config import to_config_json
from pretrain_cli.model.formats.hf_weights import published_tensors, write_weights

DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16,
    "float16": torch.float16, "fp32": torch.float32, "float32": torch.float32,
}  # fmt: skip
CPU = torch.device("cpu")


def export(
    where: Path | None,
    out: Path,
    *,
    dtype: str,
    max_shard_size: int,
    best: bool,
    notify: Callable[[str], None],
) -> Path:
    """Write a model to the folder `out`. Returns the source folder.

    Holds the weights in memory twice: in float32 and in the exported type. Raises ConfigError if
    the target exists or weights overflow the type.
    """
    check_target(out, dtype)
    folder = find_model_folder(where, notify, best=best)
    tokenizer = folder_tokenizer(folder)
    speed = resolve_speed(SpeedConfig(dtype="float32", compile=False), CPU, training=False)
    model = open_model(folder, speed, CPU, notify)
    torch_dtype = DTYPES[dtype]
    weights = published_tensors(model, lambda parameter: parameter.to(torch_dtype))
    _refuse_overflow(weights, folder, dtype)
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        write_weights(staging, weights, max_shard_size)
        dtype_name = str(torch_dtype).removeprefix("torch.")
        _write_configuration(staging, model.config, tokenizer, dtype_name)
        card = model_card(name_of(folder), model.config, tokenizer, dtype_name, *_run_facts(folder))
        write_whole(staging / "README.md", card)
        staging.rename(out)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)  # frees the space on a full disk
        raise
    return folder


def check_target(out: Path, dtype: str) -> None:
    """Raise ConfigError for an unknown type, an existing target or a missing parent folder."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: '{dtype}' is not one of {', '.join(DTYPES)}")
    if out.exists():
        raise ConfigError(f"{out}: exists, and nothing is overwritten; give another path")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: no folder {out.parent} to write {out.name} in")


def _write_configuration(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, dtype: str
) -> None:
    """Write config.json, generation_config.json and the tokenizer's files."""
    marks = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    pad = {"pad_token_id": config.pad_token_id}
    for name, content in (
        ("config.json", to_config_json(config, dtype) | marks),
        ("generation_config.json", {**marks, **pad, "do_sample": True}),
    ):
        write_whole(folder / name, json.dumps(content, indent=2) + "\n")
    tokenizer.save(folder)


def name_of(folder: Path) -> str:
    """Return a checkpoint's run name and step folder; for other folders, the folder's name."""
    run = run_of(folder)
    return folder.resolve().name if run is None else f"{run[0].name} {folder.name}"


def _run_facts(folder: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the facts of a checkpoint's run for the model card, and the run's evaluations up to
    the checkpoint's step; (None, []) if the folder belongs to no run."""
    checkpoint_run = run_of(folder)
    if checkpoint_run is None:
        return None, []
    run, record = checkpoint_run
    facts = {
        "settings": record.settings,
        "model": record.model_name,
        "data": record.data_name,
        "step": step_of(folder.resolve()),
    }
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    return facts, [row for row in evaluations if row["step"] <= facts["step"]]


def _refuse_overflow(weights: dict[str, Tensor], folder: Path, dtype: str) -> None:
    """Raise ConfigError for weights that are not finite. The largest float16 is 65,504."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ConfigError(f"--dtype: {name} of {folder} is not finite in {dtype}; give bf16")
