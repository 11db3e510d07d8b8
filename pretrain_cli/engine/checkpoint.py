"""Checkpoints: a Hugging Face model folder, and beside it what only training needs.

    runs/NAME/checkpoints/step-000400/
    ├── config.json, model.safetensors, generation_config.json      transformers opens these
    ├── tokenizer.json, tokenizer_config.json
    └── training/
        ├── optimizer.safetensors    AdamW's two moments, or Muon's, of each published tensor; RNG
        ├── state.json               step, samples consumed, tokens seen
        └── checksums.json           of every file above; written last

A checkpoint is written aside, flushed and renamed, so a folder called step-… is whole; its
checksums show what has happened to it since. Moments are kept under published names, so a run can
go on with merged projections or separate ones, on one rank or many.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from pretrain_cli.data.tokenizer import Tokenizer
from pretrain_cli.engine.distributed import Ranks, is_parted, place_like, whole
from pretrain_cli.engine.optimizer import kept_for
from pretrain_cli.errors import CheckpointError
from pretrain_cli.files import flush
from pretrain_cli.model import counting
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.config_json import to_config_json
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.huggingface import published_tensors, write_weights
from pretrain_cli.model.layout import layout

CHECKSUMS = Path("training/checksums.json")
STATE = Path("training/state.json")


SAVED_PER_SECOND = 2e8
"""Bytes: less than most disks take and than checksums are computed at."""


@dataclass(frozen=True)
class State:
    """Where a run stands."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    """Of the checkpoint with the lowest validation loss so far, among those that were evaluated."""
    finite: bool = True
    """Whether the last step was taken, as its loss and gradient norm were. Weights and moments that
    are not finite are never saved."""
    skipped: int = 0
    """Steps that changed nothing. The optimizer has counted the others."""
    rollbacks: int = 0
    """How often the run has gone back to a checkpoint."""
    passed: tuple[tuple[int, int], ...] = ()
    """Samples that are not in these weights: the first of each stretch, and the one behind it."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What a `Guard` remembers of the steps before."""


def save_checkpoint(
    folder: Path,
    model: Decoder,
    optimizer: Optimizer,
    state: State,
    *,
    tokenizer: Tokenizer,
    ranks: Ranks,
) -> Path:
    """Write `folder/step-N`. Every rank calls this; the first one writes."""
    place = folder / f"step-{state.step:06d}"
    if not ranks.is_first and not is_parted(model):  # nothing that this rank has is needed
        ranks.wait()
        return place
    weights = published_tensors(model, whole)
    moments = _published_moments(model, optimizer)
    if ranks.is_first:
        aside = place.with_name(f".{place.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "training").mkdir(parents=True)
        write_weights(aside, weights)
        ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
        config = to_config_json(model.config, "float32") | ends
        _write_json(aside / "config.json", config)
        pad = {"pad_token_id": model.config.pad_token_id}
        _write_json(aside / "generation_config.json", {**ends, **pad, "do_sample": True})
        tokenizer.save(aside)
        moments["rng"] = torch.get_rng_state()
        save_file(moments, aside / "training/optimizer.safetensors")
        _write_json(aside / STATE, asdict(state))
        seal(aside)
        shutil.rmtree(place, ignore_errors=True)
        aside.rename(place)
        _flush_folder(folder)
    ranks.wait()
    return place


def estimated_seconds(config: ModelConfig) -> float:
    """About how long a save takes, before there was one."""
    return 3 / 4 * counting.state_bytes(config) / SAVED_PER_SECOND  # gradients are not saved


def load_training_state(
    folder: Path, model: Decoder, optimizer: Optimizer, device: torch.device
) -> State:
    """Set the optimizer to where it was. Weights are read by `load_weights`, like any model's."""
    parameters = dict(model.named_parameters())
    kept, values = kept_for(optimizer), dict[str, dict[str, Tensor]]()
    with safe_open(folder / "training/optimizer.safetensors", framework="pt") as file:
        for piece in layout(model.config, merged=model.merged):
            parameter = parameters[piece.parameter]
            slot = values.setdefault(
                piece.parameter, {m: torch.empty(parameter.shape) for m in kept[parameter]}
            )
            for moment in slot:
                piece.of(slot[moment]).copy_(file.get_tensor(f"{moment}.{piece.name}"))
        torch.set_rng_state(file.get_tensor("rng"))
    state = read_state(folder)
    fused = optimizer.defaults["fused"]
    for name, slot in values.items():
        parameter = parameters[name]
        moments = {moment: place_like(value, parameter) for moment, value in slot.items()}
        optimizer.state[parameter] = moments
        if "exp_avg" in moments:  # AdamW counts; Muon doesn't
            steps = torch.tensor(
                float(state.step - state.skipped), device=device if fused else "cpu"
            )
            optimizer.state[parameter]["step"] = steps
    return state


def read_state(folder: Path) -> State:
    path = folder / STATE
    try:
        read = json.loads(path.read_text())
        passed = tuple((first, end) for first, end in read.pop("passed", ()))
        return State(**read, passed=passed)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use another checkpoint") from None


def _published_moments(model: Decoder, optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimizer keeps, under `exp_avg.NAME`, `exp_avg_sq.NAME`, `momentum_buffer.NAME`."""
    parameters, kept = dict(model.named_parameters()), kept_for(optimizer)
    gathered: dict[tuple[str, str], Tensor] = {}
    out = {}
    for piece in layout(model.config, merged=model.merged):
        for moment in kept[parameters[piece.parameter]]:
            key = (piece.parameter, moment)
            if key not in gathered:
                gathered[key] = whole(optimizer.state[parameters[piece.parameter]][moment])
            out[f"{moment}.{piece.name}"] = piece.of(gathered[key]).contiguous()
    return out


# --- on disk -------------------------------------------------------------------------------------


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(_as_json(value))


def seal(folder: Path) -> None:
    """Flush every file of a checkpoint, and write their checksums last."""
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb+") as file:
            flush(file)
            sums[path.relative_to(folder).as_posix()] = _checksum(path)
    with (folder / CHECKSUMS).open("w") as file:
        file.write(_as_json(sums))
        flush(file)
    _flush_folder(folder / "training")
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, *, model_only: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None; `model_only` leaves unread what only training
    needs."""
    try:
        text = (folder / CHECKSUMS).read_text()
        sums = json.loads(text)
        if not isinstance(sums, dict) or text != _as_json(sums):  # one byte can hide in a space
            raise ValueError
    except (OSError, ValueError):
        return f"{folder / CHECKSUMS}: missing or damaged"
    for name, expected in sums.items():
        if model_only and name.startswith("training/"):
            continue
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if _checksum(path) != expected:
            return f"{path}: checksum differs, the file was cut short or altered"
    return None
