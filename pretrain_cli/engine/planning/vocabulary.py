"""Fit a model's vocabulary to the data.

new model                       the size of the data's tokenizer, or the model's own if it is
                                about that
--init-from, same tokenizer     the model's own
--init-from, another tokenizer  as for a new model; tokens that both have keep their rows
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.data.mixture import Mixture
from pretrain_cli.data.tokenizers.shared_tokens import SharedTokens, shared_tokens
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer, read_tokenizer
from pretrain_cli.engine.runs.events import Emit, Notice
from pretrain_cli.errors import ConfigError, DataError
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.formats.hf_config import read_config
from pretrain_cli.model.formats.new_vocabulary import NewVocabulary

SAME_VOCABULARY = 512
"""Largest difference in size between a published model's vocabulary and its own tokenizer's.

They differ by spare rows and image token ids."""
UNCHECKED = "no tokenizer.json; that it is the dataset's can't be checked"


def fit_to_data(config: ModelConfig, settings: RunConfig, data: Mixture, emit: Emit) -> ModelConfig:
    """Return the config with a vocabulary for this data. vocab_size stays unchanged if it was set,
    or if the weights of --init-from have the vocabulary of the data's tokenizer.

    Raises ConfigError if the vocabulary is smaller than the data's largest token, and DataError if
    the --init-from weights share no text with the data's tokenizer, or don't name theirs.
    """
    folder, changes = settings.model.init_from, settings.model.changes

    def tell(text: str) -> None:
        emit(Notice(text))

    if folder is None:
        if "vocab_size" not in changes:
            config = _with_vocabulary(config, data, tell)
    elif not (folder / "tokenizer.json").is_file():
        _check_size(folder, config, data)
        tell(f"{folder}: {UNCHECKED}")
    elif shared := compare_tokenizers(folder, data.tokenizer):
        if not shared.texts:
            raise DataError(
                f"{data.name}: its tokenizer, {data.tokenizer.name}, shares no text with "
                f"{folder}'s; tokenize with --tokenizer {folder}"
            )
        pad = config.pad_token_id is not None
        rows = changes.get("vocab_size", _rows(data.tokenizer))
        config = replace(config, pad_token_id=None, vocab_size=rows)
        config = replace(config, pad_token_id=data.tokenizer.pad if pad else None)
        tell(
            f"Vocabulary of {data.name} ({data.tokenizer.name}) instead of {folder}'s: "
            f"{len(shared.new):,} tokens are kept, {shared.added:,} are new, drawn from the mean "
            f"and covariance of the old, and {shared.dropped:,} are dropped; "
            f"{config.vocab_size:,} rows"
        )
    if config.vocab_size <= data.largest_token:
        raise ConfigError(
            f"model.vocab_size: {config.vocab_size:,} is too small for {data.name}, which "
            f"holds token {data.largest_token:,} of {data.tokenizer.name}'s "
            f"{data.tokenizer.vocab_size:,}; leave vocab_size out, or tokenize for this model"
        )
    return config


def _with_vocabulary(
    config: ModelConfig, data: Mixture, notify: Callable[[str], None]
) -> ModelConfig:
    """Return the config with the padding id of the data's tokenizer and, unless the sizes are about
    equal, its vocabulary size, rounded up to a multiple of 64."""
    size = data.tokenizer.vocab_size
    has_pad = config.pad_token_id is not None
    config = replace(config, pad_token_id=None)
    if data.largest_token >= config.vocab_size or not _is_about(size, config):
        rows = _rows(data.tokenizer)
        notify(
            f"Vocabulary {rows:,} instead of the model's {config.vocab_size:,}: the dataset's "
            f"tokenizer, {data.tokenizer.name}, has {size:,} tokens"
        )
        config = replace(config, vocab_size=rows)
    return replace(config, pad_token_id=data.tokenizer.pad if has_pad else None)


def check_tokenizer(folder: Path, data: Mixture, notify: Callable[[str], None]) -> None:
    """Raise DataError if the weights in this folder were trained with another tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        notify(f"{folder}: {UNCHECKED}")
    elif other_tokenizer(folder, data.tokenizer):
        raise DataError(
            f"{data.name}: made with the tokenizer {data.tokenizer.name}, and {folder} "
            f"was trained with another; tokenize with --tokenizer {folder}"
        )


def other_tokenizer(folder: Path, ours: Tokenizer) -> Tokenizer | None:
    """Return the tokenizer of a model folder if its ids stand for other tokens than the data's;
    None if they are the same, or the folder has none."""
    path = folder / "tokenizer.json"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() == ours.fingerprint:
        return None
    theirs = read_tokenizer(path, name=str(folder))
    return None if theirs.backend.get_vocab() == ours.backend.get_vocab() else theirs


def compare_tokenizers(folder: Path, ours: Tokenizer) -> SharedTokens | None:
    """Match the tokens of a model folder with the data's; None if `other_tokenizer` is."""
    theirs = other_tokenizer(folder, ours)
    return theirs and shared_tokens(theirs, ours, old_rows=read_config(folder).vocab_size)


def new_vocabulary(folder: Path, ours: Tokenizer, seed: int) -> NewVocabulary | None:
    """Return the rows with which a model of this folder begins on the data's tokenizer; None to
    take them as they are."""
    shared = compare_tokenizers(folder, ours)
    if shared is None:
        return None
    kept, copied, tokens = map(torch.from_numpy, (shared.new, shared.old, shared.all_old))
    return NewVocabulary(kept, copied, tokens, seed)


def _rows(tokenizer: Tokenizer) -> int:
    return math.ceil(tokenizer.vocab_size / 64) * 64


def _is_about(size: int, config: ModelConfig) -> bool:
    return abs(size - config.vocab_size) <= SAME_VOCABULARY


def _check_size(folder: Path, config: ModelConfig, data: Mixture) -> None:
    """Raise DataError if weights without a tokenizer have a vocabulary of another size."""
    size = data.tokenizer.vocab_size
    if not _is_about(size, config):
        raise DataError(
            f"{folder}: no tokenizer.json, and {config.vocab_size:,} tokens where {data.name} has "
            f"{size:,} ({data.tokenizer.name}); put the model's tokenizer.json there, so that its "
            "tokens can be told from the dataset's"
        )
