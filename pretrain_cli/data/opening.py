"""Open what `--data` names: a dataset folder or token files of other programs, and its samples."""

from collections.abc import Callable
from pathlib import Path

from pretrain_cli.data.batches import Samples, Windows
from pretrain_cli.data.dataset import Dataset, open_dataset
from pretrain_cli.data.packing import open_packed
from pretrain_cli.data.token_files import is_foreign, open_foreign
from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer
from pretrain_cli.errors import ConfigError


def open_data(path: str, tokenizer: str | None) -> Dataset:
    """Open the dataset, or the files by name, pattern or folder, of which `tokenizer` says what
    made them. A dataset holds its own."""
    if is_foreign(path):
        return open_foreign(path, tokenizer)
    dataset = open_dataset(Path(path))
    if tokenizer and load_tokenizer(tokenizer).fingerprint != dataset.tokenizer.fingerprint:
        raise ConfigError(
            f"data.tokenizer: '{tokenizer}' is not {dataset.tokenizer.name}, which made {path}; "
            "leave it out"
        )
    return dataset


def open_samples(
    dataset: Dataset, *, seq_len: int, packing: str, notify: Callable[[str], None]
) -> Samples:
    """The training split's samples; an index of packed documents is built where there is none."""
    if packing == "best-fit":
        return open_packed(dataset, seq_len, notify)
    return Windows(
        dataset.train.tokens,
        seq_len=seq_len,
        fingerprint=dataset.fingerprint,
        separator=dataset.separator,
        separator_leads=dataset.separator_leads,
    )
