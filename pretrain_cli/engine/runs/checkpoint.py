"""Checkpoints: a Hugging Face model folder, plus a subfolder with the training state.

    runs/NAME/checkpoints/step-000400/
    ├── config.json, model.safetensors, generation_config.json      transformers opens these
    ├── tokenizer.json, tokenizer_config.json
    └── training/
        ├── optimizer.safetensors    AdamW's two moments, or Muon's, of each published tensor; RNG
        ├── state.json               step, samples consumed, tokens seen
        └── checksums.json           of every file above; written last

`take_snapshot` copies the contents while training waits; `write_checkpoint` writes them while
training continues. On a GPU the copies are only queued, and training queues its next step behind
them. The files are written to a temporary folder, which is flushed and renamed, so a folder named
step-… is always complete. The checksums reveal later damage. Weights larger than
train.max_shard_size are split into several files with an index. Moments are stored under published
tensor names, so a run can resume with merged or separate projections, on one rank or many.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.optim import Optimizer

from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.engine.optim.kinds import ADAMW_STATE, OPTIMIZERS
from pretrain_cli.engine.optim.optimizer import state_names
from pretrain_cli.engine.runtime.distributed import Ranks, distribute_like, full_tensor, is_sharded
from pretrain_cli.engine.runtime.transfer import completion
from pretrain_cli.errors import CheckpointError
from pretrain_cli.files import flush, sha256_of
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.hf_config import to_config_json
from pretrain_cli.model.formats.hf_weights import published_tensors, write_tensors, write_weights
from pretrain_cli.model.parameter_map import EMBEDDING, HEAD, Merged, parameter_map

CHECKSUMS = Path("training/checksums.json")
MOMENTS = Path("training/optimizer.safetensors")
STATE = Path("training/state.json")
BYTES_OF_A_NAME, BYTES_OF_SMALL_FILES = 200, 2**17
"""Upper bounds: bytes of a tensor's name in a file header and in the index; bytes of config.json
and the other small files."""
SAVED_PER_SECOND = 2e8
"""Bytes per second: less than most disks write and checksums process."""


@dataclass(frozen=True)
class State:
    """Position and counters of a run."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    """Lowest validation loss among the checkpoints that were evaluated; None if none was."""
    finite: bool = True
    """True if the last step was taken, so its loss and gradient norm were finite. Weights and
    moments that are not finite are never saved."""
    skipped: int = 0
    """Number of skipped steps. The optimizer has counted only the others."""
    rollbacks: int = 0
    """Number of rollbacks so far."""
    passed: tuple[tuple[int, int], ...] = ()
    """Ranges of samples that were skipped by rollbacks: (first, one past the last)."""
    guard: dict[str, Any] = field(default_factory=dict)
    """State of the StepGuard: statistics of earlier steps."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Contents of a checkpoint, on the CPU."""

    state: State
    config: ModelConfig
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    wait: Callable[[], None]
    """Waits for copies from a GPU that are only queued."""


def take_snapshot(
    model: Decoder,
    optimizer: Optimizer,
    state: State,
    *,
    tokenizer: Tokenizer,
    ranks: Ranks,
    to_host: Callable[[Tensor], Tensor],
) -> Snapshot | None:
    """Take a snapshot of everything a checkpoint holds. Every rank must call this; the first one
    gets the snapshot.

    `to_host` copies a tensor to the host, or queues the copy on the current stream. Training may
    continue without changing the snapshot, unless `to_host` returns the tensor itself.
    """
    if not ranks.is_first and not is_sharded(model):  # the first rank has everything
        return None

    def taken(tensor: Tensor) -> Tensor | None:
        tensor = full_tensor(tensor.detach())
        return to_host(tensor) if ranks.is_first else None

    kept = state_names(optimizer)
    moments = {"rng": torch.get_rng_state()}
    for moment in dict.fromkeys(name for names in kept.values() for name in names):
        found = published_tensors(
            model, lambda p, m=moment: taken(optimizer.state[p][m]) if m in kept[p] else None
        )
        moments |= {f"{moment}.{name}": tensor for name, tensor in found.items()}
    weights = published_tensors(model, taken)
    if not ranks.is_first:
        return None
    return Snapshot(
        state=state,
        config=model.config,
        tokenizer=tokenizer,
        weights=weights,
        moments=moments,
        wait=completion(ranks.device),
    )


def write_checkpoint(folder: Path, contents: Snapshot, *, max_shard_size: int) -> Path:
    """Write a complete `folder/step-N`. Raises OSError, and then leaves nothing behind."""
    place = folder / f"step-{contents.state.step:06d}"
    staging = place.with_name(f".{place.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        (staging / "training").mkdir(parents=True)
        sums = write_weights(staging, contents.weights, max_shard_size)
        sums[MOMENTS.as_posix()] = write_tensors(staging / MOMENTS, contents.moments)
        config, tokenizer = contents.config, contents.tokenizer
        ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
        _write_json(staging / "config.json", to_config_json(config, "float32") | ends)
        pad = {"pad_token_id": config.pad_token_id}
        _write_json(staging / "generation_config.json", {**ends, **pad, "do_sample": True})
        tokenizer.save(staging)
        _write_json(staging / STATE, asdict(contents.state))
        write_checksums(staging, sums)
        shutil.rmtree(place, ignore_errors=True)
        staging.rename(place)
        _flush_folder(folder)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)  # free the space on a full disk
        raise
    return place


def size_on_disk(config: ModelConfig, optimizer: str, tokenizer: Tokenizer) -> int:
    """Return the bytes of a checkpoint, rounded up. All its tensors are float32."""
    numbers = names = 0
    for piece in parameter_map(config, merged=Merged()):
        is_matrix = not piece.is_norm and piece.name not in (EMBEDDING, HEAD)
        kind = OPTIMIZERS[optimizer]
        kept = len(kind.matrix_state if is_matrix else ADAMW_STATE)
        of_rows = len(kind.row_state) if is_matrix else 0
        numbers += (1 + kept) * math.prod(piece.shape) + of_rows * piece.shape[0]
        names += 1 + kept + of_rows
    rest = len(tokenizer.json.encode()) + BYTES_OF_SMALL_FILES
    return 4 * numbers + BYTES_OF_A_NAME * names + rest


def estimated_seconds(size: int) -> float:
    """Estimate the seconds to write this many bytes, before the first save."""
    return size / SAVED_PER_SECOND


def load_training_state(folder: Path, model: Decoder, optimizer: Optimizer) -> State:
    """Restore optimizer and random state. `load_weights` reads the weights, as for any model
    folder."""
    parameters = dict(model.named_parameters())
    kept, values = state_names(optimizer), dict[str, dict[str, Tensor]]()
    with safe_open(folder / MOMENTS, framework="pt") as file:
        for piece in parameter_map(model.config, merged=model.merged):
            parameter = parameters[piece.parameter]
            shapes = {m: optimizer.state[parameter][m].shape for m in kept[parameter]}
            slot = values.setdefault(
                piece.parameter, {m: torch.empty(shape) for m, shape in shapes.items()}
            )
            for moment in slot:
                piece.of(slot[moment]).copy_(file.get_tensor(f"{moment}.{piece.name}"))
        torch.set_rng_state(file.get_tensor("rng"))
    state = read_state(folder)
    for name, slot in values.items():
        parameter = parameters[name]
        ours = optimizer.state[parameter]
        for moment, value in slot.items():
            ours[moment].copy_(distribute_like(value, parameter))
        if "step" in ours:
            ours["step"].fill_(state.step - state.skipped)
    return state


def read_state(folder: Path) -> State:
    path = folder / STATE
    try:
        read = json.loads(path.read_text())
        if not isinstance(read, dict):
            raise ValueError("not an object")
        passed = tuple((first, end) for first, end in read.pop("passed", ()))
        return State(**read, passed=passed)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use another checkpoint") from None


# --- on disk -------------------------------------------------------------------------------------


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(_as_json(value))


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Flush every file of a checkpoint, then write their checksums. `known` holds the checksums of
    files that were hashed and flushed while they were written."""
    sums = dict(known or {})
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in sums:
            with path.open("rb+") as file:
                flush(file)
            sums[name] = sha256_of(path)
    with (folder / CHECKSUMS).open("w") as file:
        file.write(_as_json(dict(sorted(sums.items()))))
        flush(file)
    _flush_folder(folder / "training")
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_damage(folder: Path, *, model_only: bool = False) -> str | None:
    """Describe what is wrong with a checkpoint, or return None. `model_only` skips the files that
    only training needs."""
    try:
        text = (folder / CHECKSUMS).read_text()
        sums = json.loads(text)
        # compare the text too: a flipped byte in whitespace can still parse to equal sums
        if not isinstance(sums, dict) or text != _as_json(sums):
            raise ValueError
    except (OSError, ValueError):
        return f"{folder / CHECKSUMS}: missing or damaged"
    for name, expected in sums.items():
        if model_only and name.startswith("training/"):
            continue
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if sha256_of(path) != expected:
            return f"{path}: checksum differs, the file was cut short or altered"
    return None
