"""Compare a folder with the same model in transformers: logits, loss and greedy text.

Both sides compute in float32 with the weights on disk. If both folders have the same weight types,
results may differ only by the order of sums. If one folder holds rounded weights, they also differ
by that rounding.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.data.dataset import Dataset
from pretrain_cli.engine.planning.data_and_model import open_mixture
from pretrain_cli.engine.planning.vocabulary import check_tokenizer
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
"""Largest allowed relative difference of logits, |ours − theirs| / |theirs|, and of the loss, for
each weight type. The largest value among the folders' types applies; if both folders have the same
types, the smallest of all."""
PROMPT_TOKENS = 16
"""Length of the prompt for greedy text; tokens."""

Logits = Callable[[Tensor], Tensor]
"""tokens (1, T) -> logits (1, T, V)."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences between the two models."""

    folder: Path
    against: Path
    tokens: int
    """Number of tokens compared, in all windows."""
    source: str
    """Dataset of the windows, or `random tokens`."""
    logits: float
    """|ours − theirs| / |theirs|; maximum over the windows."""
    largest: float
    """Largest absolute difference between corresponding logits."""
    loss: float
    their_loss: float
    agreed: int
    """Number of equal greedy tokens before the first different one."""
    greedy: int
    """Number of greedy tokens compared."""
    is_tie: bool
    """True if the first two tokens that differ are equally likely, to the tolerance."""
    text: str
    their_text: str
    tolerance: float

    @property
    def passed(self) -> bool:
        """True if logits, loss and greedy tokens agree to the tolerance."""
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
    """Compare a folder with transformers' model of `against`, or of the same folder, on windows of
    a dataset or on random tokens. Raises CheckpointError for different shapes or NaN logits."""
    for name, value, minimum in (
        ("windows", windows, 1),
        ("seq-len", seq_len, 2),
        ("greedy", greedy, 1),
    ):
        if value < minimum:
            raise ConfigError(f"--{name}: {value} is not at least {minimum}")
    torch_device = find_device(device)
    folder = find_model_folder(where, notify, best=best)
    reference_folder = find_model_folder(against, notify) if against is not None else folder
    config = read_config(folder)
    if max(seq_len, PROMPT_TOKENS + greedy) > config.max_position_embeddings:
        raise ConfigError(
            f"--seq-len: {seq_len:,}, and the model has {config.max_position_embeddings:,} "
            "positions; give less"
        )
    batch, source = _windows(folder, data, windows, seq_len, config.vocab_size, notify)
    exact = SpeedConfig(dtype="float32", attention="eager", compile=False, float32_matmul="highest")
    speed = resolve_speed(exact, torch_device, training=False)
    model = open_model(folder, speed, torch_device, notify)
    reference = open_with_transformers(reference_folder, torch_device)
    _check_vocabulary(folder, config.vocab_size, reference_folder, reference)
    tolerance = _tolerance(folder, reference_folder)
    batch = batch.to(torch_device)

    def theirs(tokens: Tensor) -> Tensor:
        return reference(input_ids=tokens, use_cache=False).logits

    worst, largest, losses = 0.0, 0.0, [0.0, 0.0]
    with torch.no_grad():
        for window in batch:
            ours, their = (side(window[None, :-1])[0].float() for side in (model, theirs))
            for place, logits in ((folder, ours), (reference_folder, their)):
                if not logits.isfinite().all():
                    advice = "take an earlier checkpoint" if place == folder else "take another"
                    raise CheckpointError(f"{place}: its logits are not finite; {advice}")
            difference = ours - their
            worst = max(worst, (difference.norm() / their.norm()).item())
            largest = max(largest, difference.abs().max().item())
            for side, logits in enumerate((ours, their)):
                losses[side] += F.cross_entropy(logits, window[1:]).item() / len(batch)
        prompt = batch[0, :PROMPT_TOKENS].tolist()
        our_tokens, their_tokens = (
            _greedy(side, prompt, greedy, torch_device) for side in (model, theirs)
        )
        agreed = next((i for i in range(greedy) if our_tokens[i] != their_tokens[i]), greedy)
        is_tie = agreed < greedy and _is_tie(
            model,
            prompt + our_tokens[:agreed],
            (our_tokens[agreed], their_tokens[agreed]),
            tolerance,
            torch_device,
        )
    tokenizer = folder_tokenizer(folder)
    return Comparison(
        folder=folder,
        against=reference_folder,
        tokens=batch[:, 1:].numel(),
        source=source,
        logits=worst,
        largest=largest,
        loss=losses[0],
        their_loss=losses[1],
        agreed=agreed,
        greedy=greedy,
        is_tie=is_tie,
        text=tokenizer.decode(our_tokens),
        their_text=tokenizer.decode(their_tokens),
        tolerance=tolerance,
    )


def _check_vocabulary(folder: Path, ours: int, reference_folder: Path, reference: Any) -> None:
    """Raise CheckpointError if the models have different vocabularies."""
    theirs = reference.get_output_embeddings().weight.shape[0]
    if theirs != ours:
        raise CheckpointError(
            f"{reference_folder}: logits for {theirs:,} tokens, and {folder} has {ours:,}; they "
            "are different models"
        )


def open_with_transformers(folder: Path, device: torch.device) -> Any:
    """Open a folder with transformers, in float32. Raises CheckpointError if weights are missing,
    which transformers would initialize at random."""
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
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: transformers doesn't open it ({reason})") from None
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
    """Return tokens (windows, seq_len + 1) and the name of their source. Windows are evenly spaced
    in the validation split, or in the training split if the validation split is too short. Without
    a dataset the tokens are random."""
    if data is None:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(0, vocabulary, (windows, seq_len + 1), generator=generator)
        return drawn, "random tokens"
    mixture = open_mixture((data,), None, notify)
    check_tokenizer(folder, mixture, notify)
    dataset: Dataset = mixture.sources[0].dataset
    splits = (dataset.val.tokens, dataset.train.tokens)
    tokens = max(splits, key=lambda split: len(split) > seq_len)  # the first that is long enough
    if len(tokens) <= seq_len:
        raise DataError(f"{data}: holds less than {seq_len + 1} tokens; give a smaller --seq-len")
    if dataset.largest_token >= vocabulary:
        raise DataError(f"{data}: holds tokens beyond the model's {vocabulary:,}")
    last = len(tokens) - seq_len - 1
    starts = [last * i // max(windows - 1, 1) for i in range(windows)]
    rows = [torch.from_numpy(tokens.read(start, seq_len + 1)) for start in starts]
    return torch.stack(rows), data


def _greedy(logits: Logits, prompt: list[int], count: int, device: torch.device) -> list[int]:
    """Return `count` greedy tokens, each computed from the whole text without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(torch.tensor([tokens], device=device))[0, -1].argmax()))
    return tokens[len(prompt) :]


def _is_tie(
    model: Decoder, tokens: list[int], pair: tuple[int, int], tolerance: float, device: torch.device
) -> bool:
    """Return whether two tokens are equally likely, to twice the tolerance."""
    logits = model(torch.tensor([tokens], device=device), last_only=True)[0, -1]
    gap = (logits[pair[0]] - logits[pair[1]]).abs()
    return bool(gap <= 2 * tolerance * logits.abs().max())


def _tolerance(folder: Path, other: Path) -> float:
    """Return the tolerance for the weight types of two folders."""
    ours, theirs = weight_types(folder), weight_types(other)
    if ours == theirs:
        return min(TOLERANCES.values())
    return max(TOLERANCES[kind] for kind in ours | theirs)


def import_transformers(who: str) -> Any:
    """Import transformers and silence its messages and progress bars. Raises ConfigError if it is
    not installed. `who`: the command or option that needs it, for the error message."""
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(
            f"{who}: the package transformers is not installed; pip install 'pretrain[verify]'"
        ) from None
    quiet_torchao()  # imported by transformers if installed
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library
