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
class Stage:
    """Part of a run with its own sources."""

    sources: tuple[Source, ...]
    first_token: int = 0
    """Tokens of the run before it."""
    seq_len: int | None = None
    """Tokens of a sample; None for those of the first stage."""

    @property
    def name(self) -> str:
        return " ".join(source.asked for source in self.sources)

    @property
    def shares(self) -> list[str]:
        """Return a text for each source: its fingerprint and its share."""
        total = sum(source.weight or 0 for source in self.sources)
        return [
            f"{source.dataset.fingerprint} {source.weight and source.weight / total}"
            for source in self.sources
        ]


@dataclass(frozen=True)
class Mixture:
    """Datasets that share one tokenizer. A single dataset is a mixture too."""

    stages: tuple[Stage, ...]
    """Parts of the run, the first one from its first token on."""

    @property
    def name(self) -> str:
        return ", then ".join(stage.name for stage in self.stages)

    @cached_property
    def sources(self) -> list[Source]:
        """The sources of all stages, each once, as in the first stage that has it."""
        named: dict[str, Source] = {}
        for stage in self.stages:
            for source in stage.sources:
                named.setdefault(source.name, source)
        return list(named.values())

    @property
    def tokenizer(self) -> Tokenizer:
        return self.sources[0].dataset.tokenizer

    @property
    def largest_token(self) -> int:
        return max(source.dataset.largest_token for source in self.sources)

    @cached_property
    def trained_on(self) -> list[Source]:
        """The sources that a stage trains on; others are used for validation only."""
        used = {s.name for stage in self.stages for s in stage.sources if s.weight != 0}
        return [source for source in self.sources if source.name in used]

    @cached_property
    def fingerprint(self) -> str:
        """Hash that changes with any dataset, their order, their proportions and the stages."""
        if len(self.sources) == len(self.stages) == 1:
            return self.sources[0].dataset.fingerprint
        parts = self.stages[0].shares
        for stage in self.stages[1:]:
            parts += [f"after {stage.first_token}, {stage.seq_len}", *stage.shares]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def validated_on(self, targets: int) -> "Mixture":
        """Return the mixture with at most this many targets of each validation split."""

        def cut(source: Source) -> Source:
            dataset = source.dataset
            val = dataset.val.prefix(targets + 1, dataset.tokenizer)
            return replace(source, dataset=replace(dataset, val=val))

        return Mixture(
            tuple(replace(stage, sources=tuple(map(cut, stage.sources))) for stage in self.stages)
        )

    def weights(self, stage: Stage) -> list[Fraction | None]:
        """Return the weight of each training source in a stage; None if it is by size."""
        there = {source.name: source.weight for source in stage.sources}
        return [there.get(source.name, Fraction(0)) for source in self.trained_on]


def as_integers(weights: Sequence[Fraction | None], samples: Sequence[int]) -> list[int]:
    """Return weights as integers in the same proportion; a source's number of samples in place of
    None."""
    given = [weight for weight in weights if weight]
    unit = math.lcm(*(weight.denominator for weight in given))
    return [
        count if weight is None else int(weight * unit)
        for weight, count in zip(weights, samples, strict=True)
    ]


def parse_sources(
    asked: Sequence[str], setting: str = "data.path"
) -> list[tuple[str, Fraction | None]]:
    """Split each PATH or PATH:WEIGHT into path and weight. Messages name `setting`."""
    parsed: list[tuple[str, Fraction | None]] = []
    for text in asked:
        found = WEIGHTED.fullmatch(text)
        path, weight = (found[1], Fraction(found[2])) if found else (text, None)
        if weight is not None and weight < 0:
            raise ConfigError(f"{setting}: the weight in {text} is below 0; give 0 or more")
        parsed.append((path, weight))
    bare = [path for path, weight in parsed if weight is None]
    if bare and len(bare) < len(parsed):
        raise ConfigError(
            f"{setting}: {bare[0]} has no weight, and others have; give one to each, for example "
            f"{bare[0]}:0.5, or to none"
        )
    if not bare and not any(weight for _, weight in parsed):
        raise ConfigError(
            f"{setting}: the weights in {' '.join(asked)} sum to 0; give at least one above 0"
        )
    return parsed


def mix(sources: Sequence[Source], later: Sequence[Stage] = ()) -> Mixture:
    """Combine the sources of a run, and of its later stages. Raises DataError if their tokenizers
    differ."""
    mixture = Mixture((Stage(tuple(sources)), *later))
    first = sources[0]
    for source in mixture.sources:
        tokenizer, other = source.dataset.tokenizer, first.dataset.tokenizer
        if tokenizer.fingerprint != other.fingerprint:
            raise DataError(
                f"{source.name}: made with the tokenizer {tokenizer.name} "
                f"({tokenizer.fingerprint[:8]}), and {first.name} with {other.name} "
                f"({other.fingerprint[:8]}); tokenize its text again, with --tokenizer {first.name}"
            )
    for stage in mixture.stages:
        _refuse_twins(stage)
    return mixture


def _refuse_twins(stage: Stage) -> None:
    seen: dict[str, Source] = {}
    for source in stage.sources:
        twin = seen.setdefault(source.dataset.fingerprint, source)
        if twin is not source:
            raise DataError(
                f"{source.name}: the same tokens as {twin.name}; give the dataset once, and a "
                "higher weight if it is to be seen more often"
            )
