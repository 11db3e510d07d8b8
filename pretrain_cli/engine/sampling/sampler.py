"""Sample the next token of every text in a batch, on the device of the logits.

The parameters apply in this order, as in transformers:

    repetition_penalty   divide positive logits of tokens already in the text by it, multiply others
    temperature          divide logits by it; 0 takes the most likely token and ignores the rest
    top_k                keep the K most likely tokens, and those as likely as the K-th
    top_p                keep the fewest most likely tokens whose probabilities sum to P or more
    min_p                keep tokens at least P times as likely as the most likely

A draw compares one uniform number in [0, 1) with the cumulative probabilities in vocabulary order.
Each text has its own numbers, drawn on the CPU from its own seed before the text begins. So equal
logits give equal tokens on every device and in every batch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain_cli.errors import ConfigError

NUCLEUS = 1024
"""Number of most likely tokens that usually contain the top-p nucleus. On a CPU, finding these is
much faster than sorting a vocabulary of 262,144. A GPU sorts all tokens: checking whether NUCLEUS
suffices would make the CPU wait."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters for choosing tokens and for ending a text."""

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
    """Sampled tokens, one for each text."""

    ids: Tensor
    """(B,); −1 where the logits are not finite."""
    logprobs: Tensor
    """(B,); the model's log-probabilities over the tokenizer's vocabulary, before any sampling
    parameter applies."""


def uniforms(seed: int, count: int) -> Tensor:
    """Draw the uniform numbers for sampling a text's tokens. -> (count,), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample_next(
    logits: Tensor, params: SamplingParams, numbers: Tensor, present: Tensor | None
) -> NextToken:
    """Sample one token for each text. logits (B, V), float32; numbers (B,), each text's next
    uniform. With a repetition penalty, present (B, V) is true for tokens in the prompt or text."""
    scores = logits
    if present is not None:
        penalty = params.repetition_penalty
        scores = torch.where(
            present, torch.where(logits > 0, logits / penalty, logits * penalty), logits
        )
    if params.temperature == 0:
        ids = scores.argmax(-1)
    else:
        ids = draw(probabilities(scores, params), numbers)
    logprobs = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return NextToken(torch.where(logits.amax(-1).isfinite(), ids, -1), logprobs)


def probabilities(scores: Tensor, params: SamplingParams) -> Tensor:
    """Return the probabilities to draw from, 0 for tokens that the parameters exclude. (B, V) ->
    (B, V), not normalized."""
    scores = scores / params.temperature
    if params.top_k is not None and params.top_k < scores.shape[-1]:
        threshold = scores.topk(params.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, float("-inf"))
    probs = scores.softmax(-1)
    if params.top_p is not None and params.top_p < 1:
        probs = torch.where(probs < _nucleus_threshold(probs, params.top_p), 0.0, probs)
    if params.min_p is not None:
        threshold = params.min_p * probs.amax(-1, keepdim=True)
        probs = torch.where(probs < threshold, 0.0, probs)
    return probs


def _nucleus_threshold(probs: Tensor, top_p: float) -> Tensor:
    """Return the smallest probability in the top-p nucleus. (B, V) -> (B, 1)."""
    on_cpu = probs.device.type == "cpu"
    ordered = probs.topk(min(NUCLEUS, probs.shape[-1])).values if on_cpu else None
    if ordered is None or bool((ordered.sum(-1) < top_p).any()):
        ordered = probs.sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    inside = (before < top_p).sum(-1, keepdim=True)
    return ordered.gather(-1, inside - 1)


def draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """Return for each row the first token whose cumulative weight, scaled to a total of 1,
    exceeds the row's number. (B, V), (B,) -> (B,)."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    thresholds = numbers.unsqueeze(-1) * cumulative[:, -1:]
    return (
        torch.searchsorted(cumulative, thresholds, right=True)
        .squeeze(-1)
        .clamp(max=weights.shape[-1] - 1)
    )
