"""Compare a folder with the same model in transformers: logits, loss and greedy text.

Both sides compute in float32 and read the weights as they are on disk. Two folders of one type may
differ by rounding alone; where one holds rounded weights, the other by what the rounding costs.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.data.dataset import Dataset
from pretrain_cli.engine.planning.data_and_model import check_tokenizer, open_mixture
from pretrain_cli.engine.runs.retention import find_model_folder
from pretrain_cli.engine.runtime.distributed import find_device
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.engine.sampling.open_model import folder_tokenizer, open_model
from pretrain_cli.errors import CheckpointError, ConfigError, DataError
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.float8 import quiet_torchao
from pretrain_cli.model.formats.hf_config import read_config
from pretrain_cli.model.formats.hf_weights import weight_types

TOLERANCES = {"F64": 1e-4, "F32": 1e-4, "F16": 5e-3, "BF16": 5e-2}
"""Largest relative difference of logits, |ours − theirs| / |theirs|, and of the loss, by the type
of the weights that were rounded. Two folders of one type: the first."""
PROMPT = 16

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences between the two models."""

    folder: Path
    against: Path
    tokens: int
    """Compared, in all windows."""
    source: str
    logits: float
    """|ours − theirs| / |theirs|, the worst window's."""
    largest: float
    """The largest difference of two logits."""
    loss: float
    their_loss: float
    agreed: int
    """Greedy tokens until the first that differs."""
    greedy: int
    is_tie: bool
    """True if the first two tokens that differ are equally likely, to the tolerance."""
    text: str
    their_text: str
    tolerance: float

    @property
    def passed(self) -> bool:
        loss = abs(self.loss - self.their_loss) <= self.tolerance * max(1.0, self.their_loss)
        greedy = self.agreed == self.greedy or self.is_tie
        return self.logits <= self.tolerance and loss and greedy


def verify(
    where: Path | None,
    *,
    against: Path | None,
    data: str | None,
    windows: int,
    seq_len: int,
    greedy: int,
    device: str,
    best: bool,
    notify: Callable[[str], None],
) -> Comparison:
    """Open both and compare them on windows of a validation split, or on random tokens."""
    for name, value, least in (
        ("windows", windows, 1),
        ("seq-len", seq_len, 2),
        ("greedy", greedy, 1),
    ):
        if value < least:
            raise ConfigError(f"--{name}: {value} is not at least {least}")
    place = find_device(device)
    folder = find_model_folder(where, notify, best=best)
    other = find_model_folder(against, notify) if against is not None else folder
    config = read_config(folder)
    if max(seq_len, PROMPT + greedy) > config.max_position_embeddings:
        raise ConfigError(
            f"--seq-len: {seq_len:,}, and the model has {config.max_position_embeddings:,} "
            "positions; give less"
        )
    batch, source = _windows(folder, data, windows, seq_len, config.vocab_size, notify)
    asked = SpeedConfig(dtype="float32", attention="eager", compile=False, float32_matmul="highest")
    model = open_model(folder, resolve_speed(asked, place, training=False), place, notify)
    reference = open_with_transformers(other, place)
    tolerance = _tolerance(folder, other)
    batch = batch.to(place)

    def theirs(tokens: Tensor) -> Tensor:
        return reference(input_ids=tokens, use_cache=False).logits

    worst, largest, losses = 0.0, 0.0, [0.0, 0.0]
    with torch.no_grad():
        for window in batch:
            ours, their = (side(window[None, :-1])[0].float() for side in (model, theirs))
            if ours.shape != their.shape:
                raise CheckpointError(
                    f"{other}: logits for {their.shape[-1]:,} tokens, and {folder} has "
                    f"{ours.shape[-1]:,}; they are different models"
                )
            difference = ours - their
            worst = max(worst, (difference.norm() / their.norm()).item())
            largest = max(largest, difference.abs().max().item())
            for side, logits in enumerate((ours, their)):
                losses[side] += F.cross_entropy(logits, window[1:]).item() / len(batch)
        prompt = batch[0, :PROMPT].tolist()
        mine, his = (_greedy(side, prompt, greedy, place) for side in (model, theirs))
        agreed = next((i for i in range(greedy) if mine[i] != his[i]), greedy)
        is_tie = agreed < greedy and _is_tie(
            model, prompt + mine[:agreed], (mine[agreed], his[agreed]), tolerance, place
        )
    if not math.isfinite(worst):
        raise CheckpointError(f"{folder}: its logits are not finite; take an earlier checkpoint")
    tokenizer = folder_tokenizer(folder)
    return Comparison(
        folder=folder,
        against=other,
        tokens=batch[:, 1:].numel(),
        source=source,
        logits=worst,
        largest=largest,
        loss=losses[0],
        their_loss=losses[1],
        agreed=agreed,
        greedy=greedy,
        is_tie=is_tie,
        text=tokenizer.decode(mine),
        their_text=tokenizer.decode(his),
        tolerance=tolerance,
    )


def open_with_transformers(folder: Path, device: torch.device) -> Any:
    """transformers' model of a folder, in float32; CheckpointError where it misses weights."""
    transformers = import_transformers("verify")
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: transformers doesn't open it ({said})") from None
    model, info = loaded
    missing = sorted([*info["missing_keys"], *info["mismatched_keys"]])
    if missing:
        raise CheckpointError(
            f"{folder}: transformers misses {len(missing)} tensors, {missing[0]} the first, and "
            "would draw them at random"
        )
    return model.to(device).eval()


def _windows(
    folder: Path,
    data: str | None,
    windows: int,
    seq_len: int,
    vocabulary: int,
    notify: Callable[[str], None],
) -> tuple[Tensor, str]:
    """(windows, seq_len + 1) tokens, evenly spaced in the validation split or else in the training
    split, or drawn at random; and what they are of."""
    if data is None:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(0, vocabulary, (windows, seq_len + 1), generator=generator)
        return drawn, "random tokens"
    mixture = open_mixture((data,), None, notify)
    check_tokenizer(folder, mixture, notify)
    dataset: Dataset = mixture.sources[0].dataset
    row = max((dataset.val.tokens, dataset.train.tokens), key=lambda row: len(row) > seq_len)
    if len(row) <= seq_len:
        raise DataError(f"{data}: holds less than {seq_len + 1} tokens; give a smaller --seq-len")
    if dataset.largest_token >= vocabulary:
        raise DataError(f"{data}: holds tokens beyond the model's {vocabulary:,}")
    last = len(row) - seq_len - 1
    starts = [last * i // max(windows - 1, 1) for i in range(windows)]
    rows = [torch.from_numpy(row.read(start, seq_len + 1)) for start in starts]
    return torch.stack(rows), data


def _greedy(logits: Logits, prompt: list[int], count: int, device: torch.device) -> list[int]:
    """The likeliest token, so many times, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(torch.tensor([tokens], device=device))[0, -1].argmax()))
    return tokens[len(prompt) :]


def _is_tie(
    model: Decoder, tokens: list[int], pair: tuple[int, int], tolerance: float, device: torch.device
) -> bool:
    logits = model(torch.tensor([tokens], device=device), last_only=True)[0, -1]
    gap = (logits[pair[0]] - logits[pair[1]]).abs()
    return bool(gap <= 2 * tolerance * logits.abs().max())


def _tolerance(folder: Path, other: Path) -> float:
    ours, theirs = weight_types(folder), weight_types(other)
    if ours == theirs:
        return min(TOLERANCES.values())
    return max(TOLERANCES[kind] for kind in ours | theirs)


def import_transformers(who: str) -> Any:
    """The library, saying nothing of its own but errors; ConfigError where it is not installed.
    `who` needs it: a command, or an option with its value."""
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(
            f"{who}: the package transformers is not installed; pip install 'pretrain[verify]'"
        ) from None
    quiet_torchao()  # which it imports where that is installed
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library
