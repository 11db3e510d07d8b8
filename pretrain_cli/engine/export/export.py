"""A model folder to publish: weights in one type and in shards, tokenizer, configuration, a model
card with what is known of the run. Written aside and renamed: it is there whole, or not there.
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
    """Write the folder of a model. Returns the one that it was made of.

    Costs the memory of the weights in float32 and, beside them, in the type that is written.
    """
    check_target(out, dtype)
    folder = find_model_folder(where, notify, best=best)
    tokenizer = folder_tokenizer(folder)
    asked = SpeedConfig(dtype="float32", compile=False)
    model = open_model(folder, resolve_speed(asked, CPU, training=False), CPU, notify)
    kind = DTYPES[dtype]
    weights = published_tensors(model, lambda parameter: parameter.to(kind))
    _refuse_overflow(weights, folder, dtype)
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        write_weights(aside, weights, max_shard_size)
        written = str(kind).removeprefix("torch.")
        _write_about_the_model(aside, model.config, tokenizer, written)
        card = model_card(name_of(folder), model.config, tokenizer, written, *_run_facts(folder))
        write_whole(aside / "README.md", card)
        aside.rename(out)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # on a full disk, it takes what others need
        raise
    return folder


def check_target(out: Path, dtype: str) -> None:
    """Refuse a type or a place that can't be written."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: '{dtype}' is not one of {', '.join(DTYPES)}")
    if out.exists():
        raise ConfigError(f"{out}: exists, and nothing is overwritten; give another place")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: no folder {out.parent} to write {out.name} in")


def _write_about_the_model(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, dtype: str
) -> None:
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    pad = {"pad_token_id": config.pad_token_id}
    for name, content in (
        ("config.json", to_config_json(config, dtype) | ends),
        ("generation_config.json", {**ends, **pad, "do_sample": True}),
    ):
        write_whole(folder / name, json.dumps(content, indent=2) + "\n")
    tokenizer.save(folder)


def name_of(folder: Path) -> str:
    """A run's name and step, or the folder's."""
    found = run_of(folder)
    return folder.resolve().name if found is None else f"{found[0].name} {folder.name}"


def _run_facts(folder: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """run.yaml of the run that a checkpoint is of, and its evaluations up to that checkpoint."""
    found = run_of(folder)
    if found is None:
        return None, []
    run, record = found
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
    """float16 ends at 65,504; a weight beyond it would be written as infinity."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ConfigError(f"--dtype: {name} of {folder} is not finite in {dtype}; give bf16")
