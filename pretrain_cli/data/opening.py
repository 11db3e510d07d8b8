"""Open the data of `--data`, a dataset folder or other programs' token files, and its samples."""

from collections.abc import Callable
from pathlib import Path

from pretrain_cli.data.batches import Samples, Windows
from pretrain_cli.data.dataset import Dataset, open_dataset
from pretrain_cli.data.packing import open_packed
from pretrain_cli.data.token_files import is_foreign, open_foreign
from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer
from pretrain_cli.errors import ConfigError


def open_data(path: str, tokenizer: str | None) -> Dataset:
    """Open a dataset folder, or token files by name, pattern or folder. Token files were written
    with `tokenizer`; a dataset contains its own."""
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
    """Return the samples of the training split. Builds the index of packed documents if it does not
    exist."""
    if packing not in ("concat", "best-fit"):
        raise ConfigError(f"data.packing: '{packing}' is not one of concat, best-fit")
    if seq_len < 1:
        raise ConfigError(f"data.seq_len: {seq_len} is not at least 1")
    if packing == "best-fit":
        return open_packed(dataset, seq_len, notify)
    return Windows(
        dataset.train.tokens,
        seq_len=seq_len,
        fingerprint=dataset.fingerprint,
        separator=dataset.separator,
        separator_leads=dataset.separator_leads,
    )
