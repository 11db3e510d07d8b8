"""Mixture: the datasets of a run and their proportions.

data/a                     one dataset
data/a data/b              two, in proportion to their sizes: one epoch of both together
data/a:0.7 data/b:0.3      seven samples of data/a to three of data/b
data/a:1 data/b:0          data/b is used for validation only
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from pretrain_cli.data.dataset import Dataset
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.errors import ConfigError, DataError

WEIGHTED = re.compile(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,2})?)", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture."""

    asked: str
    """PATH or PATH:WEIGHT, as the user gave it."""
    weight: Fraction | None
    dataset: Dataset

    @property
    def name(self) -> str:
        return str(self.dataset.path)


@dataclass(frozen=True)
class Mixture:
    """Datasets that share one tokenizer. A single dataset is a mixture too."""

    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        return " ".join(source.asked for source in self.sources)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.sources[0].dataset.tokenizer

    @property
    def largest_token(self) -> int:
        return max(source.dataset.largest_token for source in self.sources)

    @property
    def trained_on(self) -> list[Source]:
        """Return the sources that are used for training, not only for validation."""
        return [source for source in self.sources if source.weight != 0]

    @cached_property
    def fingerprint(self) -> str:
        """Hash that changes with any dataset, their order and their proportions."""
        if len(self.sources) == 1:
            return self.sources[0].dataset.fingerprint
        total = sum(source.weight or 0 for source in self.sources)
        parts = [
            f"{source.dataset.fingerprint} {source.weight and source.weight / total}"
            for source in self.sources
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def validated_on(self, targets: int) -> "Mixture":
        """Return the mixture with at most this many targets of each validation split."""
        cut = [
            replace(
                source.dataset, val=source.dataset.val.prefix(targets + 1, source.dataset.tokenizer)
            )
            for source in self.sources
        ]
        both = zip(self.sources, cut, strict=True)
        return Mixture(tuple(replace(source, dataset=dataset) for source, dataset in both))

    def weights(self, samples: Sequence[int]) -> list[int]:
        """Return integer weights of the training sources: those given, or each source's number of
        samples."""
        given = [source.weight for source in self.trained_on if source.weight is not None]
        if not given:
            return list(samples)
        unit = math.lcm(*(weight.denominator for weight in given))
        return [int(weight * unit) for weight in given]


def parse_sources(asked: Sequence[str]) -> list[tuple[str, Fraction | None]]:
    """Split each PATH or PATH:WEIGHT into path and weight."""
    parsed: list[tuple[str, Fraction | None]] = []
    for text in asked:
        found = WEIGHTED.fullmatch(text)
        path, weight = (found[1], Fraction(found[2])) if found else (text, None)
        if weight is not None and weight < 0:
            raise ConfigError(f"data.path: the weight in {text} is below 0; give 0 or more")
        parsed.append((path, weight))
    bare = [path for path, weight in parsed if weight is None]
    if bare and len(bare) < len(parsed):
        raise ConfigError(
            f"data.path: {bare[0]} has no weight, and others have; give one to each, for example "
            f"{bare[0]}:0.5, or to none"
        )
    if not bare and not any(weight for _, weight in parsed):
        raise ConfigError(
            f"data.path: the weights in {' '.join(asked)} sum to 0; give at least one above 0"
        )
    return parsed


def mix(sources: Sequence[Source]) -> Mixture:
    """Combine the sources. Raises DataError if their tokenizers differ."""
    first = sources[0]
    seen: dict[str, Source] = {}
    for source in sources:
        tokenizer, other = source.dataset.tokenizer, first.dataset.tokenizer
        if tokenizer.fingerprint != other.fingerprint:
            raise DataError(
                f"{source.name}: made with the tokenizer {tokenizer.name} "
                f"({tokenizer.fingerprint[:8]}), and {first.name} with {other.name} "
                f"({other.fingerprint[:8]}); tokenize its text again, with --tokenizer {first.name}"
            )
        twin = seen.setdefault(source.dataset.fingerprint, source)
        if twin is not source:
            raise DataError(
                f"{source.name}: the same tokens as {twin.name}; give the dataset once, and a "
                "higher weight if it is to be seen more often"
            )
    return Mixture(tuple(sources))
