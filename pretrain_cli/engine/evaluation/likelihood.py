"""Log-likelihoods of texts and continuations of prompts, for evaluation tasks.

A text begins as a document does (Tokenizer.encode_prompt): with the beginning-of-document token. If
the tokenizer has none, a text without a context follows an end-of-document token. Texts are batched
by length, longest first, which keeps padding low. Logits are computed for scored tokens only,
ROWS_OF_LOGITS at a time: with a vocabulary of 262,144 they take 1 MB a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.engine.sampling.batch import Completion
from pretrain_cli.engine.sampling.sample import generate_text
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.inference.decode import DecodeSession

BATCH_TOKENS = 8192
"""Tokens in a batch of texts to score, padding included."""
ROWS_OF_LOGITS = 64
"""Tokens whose logits are computed at a time."""
GENERATED_ROWS = 8
"""Completions generated at a time."""


@dataclass(frozen=True)
class Span:
    """Tokens, of which the last `scored` are scored. At least one token precedes these."""

    tokens: list[int]
    scored: int


@dataclass(frozen=True)
class Likelihood:
    """Sum of the scored tokens' log-probabilities; `is_greedy` if each was the most likely one."""

    logprob: float
    is_greedy: bool


class Query(NamedTuple):
    """Inputs of one row of a forward pass, and the numbers of the spans that share this row."""

    scored: int
    inputs: tuple[int, ...]
    numbers: list[int]


class Scorer:
    """Scores texts with a model. Longer texts are cut to their last `positions` tokens."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, positions: int) -> None:
        self.model, self.tokenizer, self.positions = model, tokenizer, positions
        self.device = model.embedding.weight.device

    def continuation(self, context: str, text: str) -> Span:
        """Return a span that scores the text after the context. Spaces at the end of the context
        move to the text, because tokenizers join a space to the word after it."""
        stripped = context.rstrip()
        context, text = stripped, context[len(stripped) :] + text
        before = self.tokenizer.encode_prompt(context)
        if not context:
            tokens = before + self._encode(text)
        else:
            tokens = self.tokenizer.encode_prompt(context + text)
        return Span(tokens, max(len(tokens) - len(before), 0))

    def windows(self, text: str) -> list[Span]:
        """Return spans that score each token of a text once. A long text takes several windows; the
        last window is as long as the others but scores fewer tokens."""
        tokens = [*self.tokenizer.encode_prompt(""), *self._encode(text)]
        ends = [*range(1 + self.positions, len(tokens), self.positions), len(tokens)]
        spans, start = [], 1
        for end in ends:
            if end > start:
                spans.append(Span(tokens[max(0, end - self.positions - 1) : end], end - start))
            start = end
        return spans

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.backend.encode(text, add_special_tokens=False).ids)

    def likelihoods(self, spans: list[Span]) -> Iterator[tuple[int, Likelihood]]:
        """Yield each span's number and likelihood, in the order of computation. Spans that differ
        only in their last token share a row of the forward pass, as multiple-choice answers of one
        token do."""
        numbers_of: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for number, span in enumerate(spans):
            if scored := min(span.scored, self.positions):
                inputs = tuple(span.tokens[-self.positions - 1 : -1])
                numbers_of.setdefault((scored, inputs), []).append(number)
            else:
                yield number, Likelihood(0.0, True)
        queries = [Query(*key, numbers) for key, numbers in numbers_of.items()]
        queries.sort(key=lambda query: -len(query.inputs))
        while queries:
            rows = max(1, BATCH_TOKENS // len(queries[0].inputs))
            yield from self._score(queries[:rows], spans)
            queries = queries[rows:]

    @torch.no_grad()
    def _score(self, batch: list[Query], spans: list[Span]) -> Iterator[tuple[int, Likelihood]]:
        longest = max(len(query.inputs) for query in batch)
        padded = [[*query.inputs, *[0] * (longest - len(query.inputs))] for query in batch]
        hidden = self.model.hidden(torch.tensor(padded, device=self.device))  # (B, T, D)
        for row, (scored, inputs, numbers) in enumerate(batch):
            end = len(inputs)
            targets = torch.tensor([spans[n].tokens[-scored:] for n in numbers], device=self.device)
            logprobs, greedy = [], []
            for chunk, chunk_targets in zip(
                hidden[row, end - scored : end].split(ROWS_OF_LOGITS),
                targets.split(ROWS_OF_LOGITS, dim=1),  # (spans, rows)
                strict=True,
            ):
                logits = F.linear(chunk, self.model.head_weight.to(chunk.dtype)).float()
                log_probs = logits.log_softmax(-1)  # (rows, V)
                rows = torch.arange(len(chunk), device=self.device)
                logprobs.append(log_probs[rows, chunk_targets].sum(-1))
                greedy.append((log_probs.argmax(-1) == chunk_targets).all(-1))
            sums = torch.stack(logprobs).sum(0).tolist()
            all_greedy = torch.stack(greedy).all(0).tolist()
            for number, logprob, is_greedy in zip(numbers, sums, all_greedy, strict=True):
                yield number, Likelihood(logprob, is_greedy)

    def generate(self, prompts: list[str], params: SamplingParams) -> Iterator[tuple[int, str]]:
        """Yield each prompt's number and its continuation, which ends before a stop string."""
        limit = min(params.max_tokens, self.positions - 1)
        room = self.positions - limit
        completions = [
            Completion(
                number=number,
                prompt=self.tokenizer.encode_prompt(prompt)[-room:],
                limit=limit,
                reason="max-tokens",
                seed=(params.seed + number) % 2**63,
            )
            for number, prompt in enumerate(prompts)
        ]
        params = replace(params, max_tokens=limit)
        session = DecodeSession(self.model)
        for delta in generate_text(
            session, self.tokenizer, completions, params, rows=GENERATED_ROWS
        ):
            if delta.full_text is not None:
                yield delta.completion.number, delta.full_text
