"""Which tokens a step trains on: a pure function of the dataset, the seed and the sample's number.

The training tokens are cut into windows of `seq_len + 1`, one every `seq_len`, so that every token
but the first is a target once. Each epoch goes through them in an order of its own, which is
computed and not stored: a keyed permutation gives the k-th sample's window from k alone.

    sample k ── epoch k // windows, place k % windows ── permutation ── window ── tokens

So any batch is read at once, on any rank, and there is nothing to save but the count of samples.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

from pretrain_cli.data.shards import TokenStream
from pretrain_cli.errors import ConfigError

IGNORED = -100
ROUNDS = 4


class Permutation:
    """A random-looking bijection of 0 … size − 1, by a key.

    A Feistel network over the next even power of two, walked until it lands inside: at most four
    steps on average, each a few multiplications, vectorized.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self.half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
        digest = hashlib.sha256(key.encode()).digest()
        self.keys = np.frombuffer(digest, dtype="<u8")[:ROUNDS].astype(np.uint64)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """The places of these numbers. (n,) -> (n,) int64."""
        out = self._mixed(numbers.astype(np.uint64))
        while (outside := out >= self.size).any():
            out[outside] = self._mixed(out[outside])
        return out.astype(np.int64)

    def _mixed(self, x: np.ndarray) -> np.ndarray:
        half = np.uint64(self.half)
        low = np.uint64((1 << self.half) - 1)
        left, right = x >> half, x & low
        for key in self.keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        return (left << half) | right


class Batches:
    """Training samples by number. One rank of `world` reads its share of every step."""

    def __init__(
        self,
        tokens: TokenStream,
        *,
        seq_len: int,
        samples_per_step: int,
        seed: int,
        fingerprint: str,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.windows = (len(tokens) - 1) // seq_len
        if self.windows < 1:
            raise ConfigError(
                f"data.seq_len: {seq_len} is beyond the dataset, whose training split has "
                f"{len(tokens):,} tokens; give at most {max(len(tokens) - 1, 0):,}, or more text"
            )
        self.seed = seed
        self.fingerprint = fingerprint
        share = samples_per_step // world
        self.mine = slice(rank * share, (rank + 1) * share)
        self.samples_per_step = samples_per_step

    def starting_at(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's share of the step whose first sample has this number.

        -> inputs and targets, each (samples_per_step / world, seq_len) int64.
        """
        numbers = np.arange(sample, sample + self.samples_per_step)[self.mine]
        return split_windows([self.window(start) for start in self.windows_of(numbers)])

    def windows_of(self, numbers: np.ndarray) -> np.ndarray:
        """The windows that are samples of these numbers. (n,) -> (n,)."""
        epochs, places = np.divmod(numbers, self.windows)
        out = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            key = f"{self.fingerprint} {self.seed} {epoch}"
            chosen = epochs == epoch
            out[chosen] = Permutation(self.windows, key)(places[chosen])
        return out

    def window(self, number: int) -> np.ndarray:
        return self.tokens.read(int(number) * self.seq_len, self.seq_len + 1)


def split_windows(windows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Windows of n + 1 tokens to inputs and, one token on, targets. -> two of (B, n)."""
    rows = np.stack(windows)
    return rows[:, :-1], rows[:, 1:]


def validation_batches(
    tokens: TokenStream, *, seq_len: int, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every token of a split but the first as a target exactly once, in batches of one shape.

    Ranks take batches in turn. What is short at the end, and whole batches that even the ranks out,
    are filled with targets that are not counted.
    """
    total = max(len(tokens) - 1, 0)  # targets
    windows = -(-total // seq_len)
    batches = -(-windows // batch_size)
    for number in range(rank, -(-batches // world) * world, world):
        inputs = np.zeros((batch_size, seq_len), dtype=np.int64)
        targets = np.full((batch_size, seq_len), IGNORED, dtype=np.int64)
        for row in range(batch_size):
            start = (number * batch_size + row) * seq_len
            if start >= total:
                break
            window = tokens.read(start, seq_len + 1)
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        yield inputs, targets
