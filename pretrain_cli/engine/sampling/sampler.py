"""Sample the next token, for every text of a batch at once, on the device of the logits.

What each control does, in this order, as in transformers:

    repetition_penalty   logits of tokens that are in the text: divided by it above 0, else times it
    temperature          logits divided by it; 0 takes the likeliest, and nothing below matters
    top_k                of the K likeliest tokens only, and those as likely as the K-th
    top_p                of the fewest likeliest tokens whose probabilities reach P
    min_p                of tokens at least P times as likely as the likeliest

A draw is one number in [0, 1) against the sums of the probabilities in the vocabulary's order. Each
text has its own such numbers, drawn on the CPU from its own seed before it begins: given the same
logits it draws the same tokens, whatever else is in the batch and on whatever device.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain_cli.errors import ConfigError

NUCLEUS = 1024
"""Tokens that mostly hold a top-p nucleus. On a CPU finding these takes a small part of the time
that sorting a vocabulary of 262,144 does; a GPU, where looking whether they do would keep the CPU
waiting, sorts all."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of choosing tokens, and of ending a text."""

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    """Seed of the first text; the k-th after it has the seed + k."""

    def __post_init__(self) -> None:
        for name, value, fits, wanted in (
            ("max-tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top-k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "from 0 up to 2^63"),
            ("top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0, up to 1"),
            ("min-p", self.min_p, self.min_p is None or 0 < self.min_p <= 1, "above 0, up to 1"),
            (
                "repetition-penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < float("inf"),
                "above 0",
            ),
        ):
            if not fits:
                raise ConfigError(f"--{name}: {value} is not {wanted}")
        if "" in self.stop:
            raise ConfigError("--stop: an empty text ends nothing; leave it out")


class NextToken(NamedTuple):
    """One token for each text."""

    ids: Tensor
    """(B,); −1 where the logits are not finite."""
    logprobs: Tensor
    """Its log-probability by the model itself, before any control, among the tokens that there
    are. (B,)"""


def uniforms(seed: int, count: int) -> Tensor:
    """The numbers that a text's tokens are drawn with, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample_next(
    logits: Tensor, controls: SamplingParams, drawn: Tensor, present: Tensor | None
) -> NextToken:
    """One token for each text. (B, V), float32; `drawn` (B,), one of its uniforms; with a
    repetition penalty `present` (B, V), true for the tokens of its prompt and text."""
    scores = logits
    if present is not None:
        penalty = controls.repetition_penalty
        scores = torch.where(
            present, torch.where(logits > 0, logits / penalty, logits * penalty), logits
        )
    if controls.temperature == 0:
        ids = scores.argmax(-1)
    else:
        ids = draw(probabilities(scores, controls), drawn)
    logprobs = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return NextToken(torch.where(logits.amax(-1).isfinite(), ids, -1), logprobs)


def probabilities(scores: Tensor, controls: SamplingParams) -> Tensor:
    """Return the probabilities to draw from, 0 for tokens that the parameters exclude. (B, V) ->
    (B, V), not normalized."""
    scores = scores / controls.temperature
    if controls.top_k is not None and controls.top_k < scores.shape[-1]:
        least = scores.topk(controls.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    likely = scores.softmax(-1)
    if controls.top_p is not None and controls.top_p < 1:
        likely = torch.where(likely < _least_of_nucleus(likely, controls.top_p), 0.0, likely)
    if controls.min_p is not None:
        least = controls.min_p * likely.amax(-1, keepdim=True)
        likely = torch.where(likely < least, 0.0, likely)
    return likely


def _least_of_nucleus(likely: Tensor, top_p: float) -> Tensor:
    """The smallest probability among the fewest that reach top_p. (B, V) -> (B, 1)."""
    on_cpu = likely.device.type == "cpu"
    ordered = likely.topk(min(NUCLEUS, likely.shape[-1])).values if on_cpu else None
    if ordered is None or bool((ordered.sum(-1) < top_p).any()):
        ordered = likely.sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    inside = (before < top_p).sum(-1, keepdim=True)
    return ordered.gather(-1, inside - 1)


def draw(likely: Tensor, drawn: Tensor) -> Tensor:
    """The token at which the running sum passes its share of the whole. (B, V), (B,) -> (B,)."""
    running = likely.cumsum(-1, dtype=torch.float64)
    share = drawn.unsqueeze(-1) * running[:, -1:]
    return (
        torch.searchsorted(running, share, right=True).squeeze(-1).clamp(max=likely.shape[-1] - 1)
    )
