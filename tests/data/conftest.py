"""What the tests of text, tokenizers, shards and batches share."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain_cli.data.shards import TokenStream
from pretrain_cli.data.tokenizer import HUB, Tokenizer, load_tokenizer, train_bpe


@functools.cache
def _loaded(kind: str) -> Tokenizer:
    if kind == "bpe":
        source = "def square(number):\n    return number * number\n\n\nprint(square(12))\n"
        return train_bpe([source * 3, "The quick brown fox, the lazy dog. " * 5], 320)
    return load_tokenizer(kind)


@pytest.fixture(scope="session")
def load() -> Callable[[str], Tokenizer]:
    """A tokenizer by name; a published one from $PRETRAIN_TOKENIZERS, or the test is skipped."""

    def tokenizer(kind: str) -> Tokenizer:
        folder = os.environ.get("PRETRAIN_TOKENIZERS", "")
        if kind in HUB and not Path(folder, kind, "tokenizer.json").is_file():
            pytest.skip(f"{kind}: no {kind}/tokenizer.json in $PRETRAIN_TOKENIZERS ('{folder}')")
        return _loaded(kind)

    return tokenizer


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenStream]:
    """A TokenStream over shards of these tokens."""
    folder = tmp_path_factory.mktemp("stream")

    def make(*shards: np.ndarray | range, dtype: str = "uint16") -> TokenStream:
        paths = []
        for number, tokens in enumerate(shards):
            paths.append(folder / f"{number}.bin")
            paths[-1].unlink(missing_ok=True)  # an earlier one may still be mapped
            np.asarray(tokens).astype(np.dtype(dtype).newbyteorder("<")).tofile(paths[-1])
        return TokenStream(paths, dtype)

    return make
