"""Log-likelihoods of texts, and continuations of prompts, as evaluation tasks need them.

A text is conditioned on what its tokenizer begins documents with (Tokenizer.encode_prompt). Texts
go through the decoder together, the longest first, so that little of a batch is padding. Logits are
made of the tokens asked for alone, and some rows at a time: those of a vocabulary of 262,144 are 1
MB a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.engine.sampling.batch import Completion
from pretrain_cli.engine.sampling.sample import generate_text
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.inference.decode import DecodeSession

TOKENS_AT_ONCE = 8192
ROWS_OF_LOGITS = 64
TEXTS_AT_ONCE = 8


@dataclass(frozen=True)
class Span:
    """Tokens, and how many at their end are asked about; at least one is before those."""

    tokens: list[int]
    asked: int


@dataclass(frozen=True)
class Found:
    """Log-probabilities of the requested tokens, summed, and whether each was the most likely."""

    logprob: float
    is_greedy: bool


class Reader:
    """A model that is asked about texts of at most `positions` tokens; what is longer loses its
    beginning."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, positions: int) -> None:
        self.model, self.tokenizer, self.positions = model, tokenizer, positions
        self.device = model.embedding.weight.device

    def continuation(self, context: str, text: str) -> Span:
        """A text behind a context. Spaces at the context's end are taken to be the text's, as they
        are part of a word's token."""
        stripped = context.rstrip()
        context, text = stripped, context[len(stripped) :] + text
        before = self.tokenizer.encode_prompt(context)
        if not context:
            whole = before + self._plain(text)
        else:
            whole = self.tokenizer.encode_prompt(context + text)
        return Span(whole, max(len(whole) - len(before), 0))

    def windows(self, text: str) -> list[Span]:
        """A whole text, each of its tokens asked about once; of a long one in windows, the last of
        which is as long as the others."""
        tokens = [*self.tokenizer.encode_prompt(""), *self._plain(text)]
        ends = [*range(1 + self.positions, len(tokens), self.positions), len(tokens)]
        spans, known = [], 1
        for end in ends:
            if end > known:
                spans.append(Span(tokens[max(0, end - self.positions - 1) : end], end - known))
            known = end
        return spans

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer.backend.encode(text, add_special_tokens=False).ids)

    def likelihoods(self, spans: list[Span]) -> Iterator[tuple[int, Found]]:
        """Each span's number and what was found, in the order that it is found in. Spans that
        differ in their last token alone, as the choices of many a question, are read once."""
        read: dict[tuple[int, ...], list[int]] = {}
        for number, span in enumerate(spans):
            if asked := min(span.asked, self.positions):
                inputs = span.tokens[-self.positions - 1 : -1]
                read.setdefault((asked, *inputs), []).append(number)
            else:
                yield number, Found(0.0, True)
        waiting = sorted(read.items(), key=lambda item: -len(item[0]))
        while waiting:
            rows = max(1, TOKENS_AT_ONCE // (len(waiting[0][0]) - 1))
            yield from self._together(waiting[:rows], spans)
            waiting = waiting[rows:]

    @torch.no_grad()
    def _together(
        self, batch: list[tuple[tuple[int, ...], list[int]]], spans: list[Span]
    ) -> Iterator[tuple[int, Found]]:
        longest = max(len(key) - 1 for key, _ in batch)
        padded = [[*key[1:], *[0] * (longest - len(key) + 1)] for key, _ in batch]
        hidden = self.model.hidden(torch.tensor(padded, device=self.device))
        for row, (key, numbers) in enumerate(batch):
            asked, end = key[0], len(key) - 1
            targets = torch.tensor([spans[n].tokens[-asked:] for n in numbers], device=self.device)
            logprobs, greedy = [], []
            for part, wanted in zip(
                hidden[row, end - asked : end].split(ROWS_OF_LOGITS),
                targets.split(ROWS_OF_LOGITS, dim=1),
                strict=True,
            ):
                logits = F.linear(part, self.model.head_weight.to(part.dtype)).float()
                likely = logits.log_softmax(-1)  # (rows, V)
                places = torch.arange(len(part), device=self.device)
                logprobs.append(likely[places, wanted].sum(-1))
                greedy.append((likely.argmax(-1) == wanted).all(-1))
            sums = torch.stack(logprobs).sum(0).tolist()
            whether = torch.stack(greedy).all(0).tolist()
            for number, logprob, is_greedy in zip(numbers, sums, whether, strict=True):
                yield number, Found(logprob, is_greedy)

    def generate(self, prompts: list[str], params: SamplingParams) -> Iterator[tuple[int, str]]:
        """Yield each prompt's number and its continuation, up to a stop string."""
        limit = min(params.max_tokens, self.positions - 1)
        room = self.positions - limit
        texts = [
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
        for delta in generate_text(
            DecodeSession(self.model), self.tokenizer, texts, params, rows=TEXTS_AT_ONCE
        ):
            if delta.full_text is not None:
                yield delta.completion.number, delta.full_text
