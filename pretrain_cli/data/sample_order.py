"""Sample order: sample k is computed from k, the seed and the dataset; no permutation is stored.

    k ── interleaving ──> a source, and a number within it
         number // size ─> epoch       number % size ── the epoch's permutation ──> sample

All functions take and return whole arrays, so a step costs microseconds, at any position.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from typing import TypeVar

import numpy as np

ROUNDS = 6
"""Rounds of the Feistel network. From four on, statistical tests cannot tell the order from a
random one. Must be even, so that the two halves end where they began."""
MIX = np.uint64(0x9E3779B97F4A7C15)
HALF = np.uint64(32)
LARGEST_TOTAL = 2**31
"""Largest sum of weights; products with it fit in 63 bits."""

Numbers = TypeVar("Numbers", int, np.ndarray)


class Permutation:
    """Pseudorandom bijection of 0 … size − 1, selected by a key.

    A Feistel network on the cells of a rectangle of about √size × √size: row and column are shifted
    in turn, each by a keyed hash of the other. The rectangle exceeds `size` by less than a row; a
    value that lands in the excess is permuted again until it lands inside.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        rows = math.isqrt(size - 1) + 1
        self.sides = np.uint64(rows), np.uint64(-(-size // rows))
        digest = hashlib.shake_256(key.encode()).digest(16 * ROUNDS)
        keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        self.keys = list(zip(keys[::2] | np.uint64(1), keys[1::2], strict=True))

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Return the permuted positions. (n,) -> (n,) int64."""
        places = self._mixed(numbers.astype(np.uint64))
        while (outside := places >= self.size).any():
            places[outside] = self._mixed(places[outside])
        return places.astype(np.int64)

    def _mixed(self, cells: np.ndarray) -> np.ndarray:
        one, other = np.divmod(cells, self.sides[1])
        for number, (factor, summand) in enumerate(self.keys):
            moved = other * factor  # uint64: this product and the next are modulo 2⁶⁴
            moved += summand
            moved ^= moved >> HALF
            moved *= MIX
            moved >>= HALF
            moved += one
            moved %= self.sides[number % 2]
            one, other = other, moved
        return one * self.sides[1] + other


class Order:
    """Endless order of one source's samples: epoch after epoch, each with its own permutation."""

    def __init__(self, size: int, key: str) -> None:
        self.size = size

        def permutation(epoch: int) -> Permutation:
            return Permutation(size, f"{key} {epoch}")

        self.epoch = lru_cache(4)(permutation)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Return the samples at these ascending numbers. (n,) -> (n,) int64."""
        epochs, places = np.divmod(numbers, self.size)
        samples = np.empty_like(places)
        first = 0
        while first < len(numbers):
            last = int(np.searchsorted(epochs, epochs[first], side="right"))
            samples[first:last] = self.epoch(int(epochs[first]))(places[first:last])
            first = last
        return samples


Tree = int | tuple["Tree", "Tree", int, int]
"""A source, or (left tree, right tree, weight of the left, weight of both)."""


class Interleaving:
    """Source of each sample: in proportion to the weights, spread as evenly as possible.

    The sources form a binary tree. Of the first n samples at a node, n · weight / total, rounded,
    go to its first branch. The lightest sources are joined first (Huffman's tree), so that rounding
    errors along a branch hardly add up: among the first samples, for any count, each source has its
    exact share within 1 for up to three sources and within 1.7 for any number. After as many
    samples as the sum of weights, shares are exact.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        """Weights are non-negative integers, not all 0."""
        total = sum(weights)
        if total > LARGEST_TOTAL:
            weights = [-(-weight * LARGEST_TOTAL // total) for weight in weights]
        self.sources = len(weights)
        later = count(len(weights))
        heap: list[tuple[int, int, Tree]] = [(w, n, n) for n, w in enumerate(weights) if w]
        heapq.heapify(heap)
        while len(heap) > 1:
            (a, _, one), (b, _, other) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (a + b, next(later), (one, other, a, a + b)))
        self.tree = heap[0][2]

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each sample and its number within that source. (n,) -> two of (n,)
        int64."""
        sources = np.zeros(len(numbers), np.int64)
        within = np.zeros(len(numbers), np.int64)
        parts = [(self.tree, np.arange(len(numbers)), np.asarray(numbers, np.int64))]
        while parts:
            node, places, numbers = parts.pop()
            if isinstance(node, int):
                sources[places], within[places] = node, numbers
                continue
            one, other, weight, total = node
            before = _share(numbers, weight, total)
            first = _share(numbers + 1, weight, total) > before
            parts.append((one, places[first], before[first]))
            parts.append((other, places[~first], (numbers - before)[~first]))
        return sources, within

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` come from each source."""
        counts = [0] * self.sources
        parts = [(self.tree, samples)]
        while parts:
            node, number = parts.pop()
            if isinstance(node, int):
                counts[node] = number
                continue
            one, other, weight, total = node
            first = _share(number, weight, total)
            parts += [(one, first), (other, number - first)]
        return counts


def _share(numbers: Numbers, weight: int, total: int) -> Numbers:
    """Return numbers · weight / total, rounded, without a product beyond 63 bits."""
    whole, rest = numbers // total, numbers % total
    return whole * weight + (rest * weight + total // 2) // total
