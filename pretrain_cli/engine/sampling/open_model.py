"""Open a model folder for use without training: by sample, evaluate, verify and export."""

from collections.abc import Callable
from pathlib import Path

import torch

from pretrain_cli.data.tokenizers.tokenizer import Tokenizer, read_tokenizer
from pretrain_cli.engine.runs.run_yaml import RUN_YAML, RunRecord, read_record
from pretrain_cli.engine.runtime.speed import (
    Speed,
    apply_process_settings,
    build_model,
    compile_blocks,
)
from pretrain_cli.errors import CheckpointError, ConfigError
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.hf_config import read_config
from pretrain_cli.model.formats.hf_weights import load_weights, say_left_out
from pretrain_cli.model.inference.int8 import no_quantizing


def open_model(
    folder: Path, speed: Speed, device: torch.device, notify: Callable[[str], None]
) -> Decoder:
    """Open a folder's model with its weights. Reports tensors in the files that the model does not
    have."""
    config = read_config(folder)
    apply_process_settings(speed)
    model = build_model(config, speed, device)
    left_out = load_weights(model, folder)
    if left_out:
        notify(say_left_out(folder, left_out))
    compile_blocks(model, speed)
    return model.eval()


def wants_int8(quantize: str | None, config: ModelConfig) -> bool:
    """Return whether `--quantize` asks for int8. Raises ConfigError if int8 is unavailable."""
    if quantize is None:
        return False
    if quantize != "int8":
        raise ConfigError(f"--quantize: '{quantize}' is not int8")
    if reason := no_quantizing(config):
        raise ConfigError(f"--quantize: not of this model: {reason}; leave it out")
    return True


def folder_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer in a model folder. Raises CheckpointError if there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no tokenizer.json; put the model's beside its weights")
    return read_tokenizer(path, name=folder.name)


def run_of(folder: Path) -> tuple[Path, RunRecord] | None:
    """Return the run folder of a checkpoint and its run.yaml; None for any other model folder."""
    run = folder.resolve().parent.parent
    if folder.resolve().parent.name != "checkpoints" or not (run / RUN_YAML).is_file():
        return None
    return run, read_record(run)
