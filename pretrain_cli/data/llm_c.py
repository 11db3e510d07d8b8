"""Shards as llm.c and modded-nanogpt read them: a header of 256 words, then uint16 tokens.

Their documents begin with the separator, where ours end with it: the first shard has one more.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain_cli.data.shards import Shard

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024


def header(tokens: int) -> bytes:
    """What stands before so many tokens."""
    words = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    words[:3] = MAGIC, VERSION, tokens
    return words.tobytes()


def write_llm_c(folder: Path, shards: Sequence[Shard], *, name: str, separator: int | None) -> None:
    """A file for each shard, in `llm.c/`: NAME_train_000001.bin, …; `separator` goes before the
    first token of a split, where documents have no mark of their own at the beginning."""
    target = folder / "llm.c"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    counts = {"train": 0, "val": 0}
    for shard in sorted(shards, key=lambda shard: shard.file):
        counts[shard.split] += 1
        first = counts[shard.split] == 1 and separator is not None
        path = target / f"{name}_{shard.split}_{counts[shard.split]:06d}.bin"
        with path.open("wb") as file, (folder / shard.file).open("rb") as tokens:
            file.write(header(shard.tokens + first))
            if first:
                file.write(np.array([separator], dtype="<u2").tobytes())
            shutil.copyfileobj(tokens, file, 2**20)
