"""Many texts at once: rows of a batch that are filled anew as texts end.

Every turn is one step for all rows (model/inference/decode.py), then one choice for all rows
(sampler.py), both on the device. Texts wait in a queue; a row whose text has ended takes the next
one, prefilled apart, so a short text keeps none waiting. The same prompt several times in a row is
prefilled once.

On a GPU the chosen tokens are looked at a few turns late, while the next are already being made: no
turn waits for the CPU. What was made beyond a text's end in the meantime is thrown away. That a
text has as many tokens as it may is known without looking.

What a text is does not depend on the others in the batch, but for rounding: its logits are computed
in products with more or fewer rows, in whose sums the library may take another order. With greedy
choice or equal uniforms the token is another only where two are as likely to within that rounding.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain_cli.engine.sampling.sampler import NextToken, SamplingParams, sample_next, uniforms
from pretrain_cli.errors import CheckpointError
from pretrain_cli.model.inference.decode import DecodeSession
from pretrain_cli.model.kv_cache import KVCache

LATE = 4
"""Turns by which tokens are looked at late on a GPU."""
PADDED = 0.25
"""Prompts of different lengths are prefilled together while padding is at most this share."""


@dataclass
class Completion:
    """One text: its prompt, and what is made of it."""

    number: int
    prompt: list[int]
    limit: int
    """Tokens that there is room for or that were asked for."""
    reason: str
    """Why it ends at the limit: max-tokens, or positions."""
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: str = ""
    """Why it ended: end, max-tokens, positions, or what whoever reads it sets."""


@dataclass
class Row:
    """A row of the batch: the text that is in it, and how many of its tokens were begun."""

    text: Completion | None = None
    begun: int = 0


class ContinuousBatch:
    """Texts of one model, so many at a time."""

    def __init__(
        self,
        writer: DecodeSession,
        controls: SamplingParams,
        *,
        rows: int,
        capacity: int,
        end: int,
        known: int,
    ) -> None:
        """`capacity`: the longest text with its prompt. `end` ends a text; ids from `known` on are
        rows that pad the vocabulary, and are never chosen."""
        self.writer, self.controls, self.end, self.known = writer, controls, end, known
        self.device = writer.device
        self.rows = [Row() for _ in range(rows)]
        self.cache = writer.new_cache(batch=rows, capacity=capacity)
        self.positions = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.drawn = torch.zeros(rows, capacity, dtype=torch.float64, device=self.device)
        self.index = torch.zeros_like(self.positions)
        """Index of the next number in `drawn`."""
        self.present: Tensor | None = None
        if controls.repetition_penalty != 1:
            self.present = torch.zeros(rows, known, dtype=torch.bool, device=self.device)
        self.logits = torch.zeros(rows, known, device=self.device)
        self.late = LATE if self.device.type == "cuda" else 0
        self.prefilled: tuple[list[int], KVCache, int, Tensor] | None = None

    @torch.no_grad()
    def run(self, texts: Iterable[Completion]) -> Iterator[tuple[Completion, int | None]]:
        """Each token as it is made, with its text; None for an end without one. Whoever reads may
        set `stopped`, which ends that text."""
        queue = deque(texts)
        waiting: deque[tuple[Tensor, Tensor, object, list[Completion | None]]] = deque()
        ids: Tensor | None = None
        while True:
            if ids is not None and any(row.text for row in self.rows):
                self._step(ids)
            self._fill(queue)
            if any(row.text for row in self.rows):
                choice = sample_next(self.logits, self.controls, self._uniforms(), self.present)
                ids = choice.ids.clamp(min=0)
                if self.present is not None:
                    self.present.scatter_(1, ids.unsqueeze(-1), True)
                waiting.append(self._fetch(choice))
                self._count()
            elif not waiting:
                return
            busy = any(row.text for row in self.rows)
            while waiting and (len(waiting) > self.late or not busy):
                yield from self._look(*waiting.popleft())
                busy = any(row.text for row in self.rows)

    def _step(self, ids: Tensor) -> None:
        needed = max(len(r.text.prompt) + r.begun for r in self.rows if r.text)
        self.cache.reserve(needed)
        logits = self.writer.step(self.cache, ids, self.positions)
        self.logits = logits[:, : self.known].float()
        self.positions += 1  # in rows without a text it means nothing

    def _uniforms(self) -> Tensor:
        chosen = self.drawn.gather(1, self.index.unsqueeze(-1)).squeeze(-1)
        self.index = (self.index + 1).clamp(max=self.drawn.shape[1] - 1)
        return chosen

    def _fill(self, queue: deque[Completion]) -> None:
        """Give rows without a text the next ones."""
        free = [row for row in range(len(self.rows)) if self.rows[row].text is None]
        taken = [(row, queue.popleft()) for row in free[: len(queue)]]
        if not taken:
            return
        texts = {tuple(text.prompt): text for _, text in taken}
        made = {} if self.prefilled is None else {tuple(self.prefilled[0]): self.prefilled}
        for group in _groups([text.prompt for key, text in texts.items() if key not in made]):
            cache = self.writer.new_cache(
                batch=len(group), capacity=len(group[0]), ends=[len(prompt) for prompt in group]
            )
            logits = self.writer.prefill(cache, group)[:, : self.known].float()
            for place, prompt in enumerate(group):
                made[tuple(prompt)] = prompt, cache, place, logits[place]
        self.logits = self.logits.clone()  # may be what a CUDA graph writes into
        for row, text in taken:
            self._begin(row, text, *made[tuple(text.prompt)][1:])
        self.prefilled = made[tuple(taken[-1][1].prompt)] if queue else None

    def _begin(
        self, row: int, text: Completion, prompt: KVCache, place: int, logits: Tensor
    ) -> None:
        self.rows[row] = Row(text)
        self.cache.take(row, prompt, place, len(text.prompt))
        self.logits[row] = logits
        self.positions[row] = len(text.prompt)
        self.index[row] = 0
        if self.controls.temperature > 0:
            numbers = uniforms(text.seed, text.limit)
            self.drawn[row, : text.limit] = numbers.to(self.device)
        if self.present is not None:
            self.present[row] = False
            self.present[row, torch.tensor(text.prompt, device=self.device)] = True

    def _fetch(self, choice: NextToken) -> tuple[Tensor, Tensor, object, list[Completion | None]]:
        """Begin to copy a choice to the CPU: for which texts, and what says that it is there."""
        texts = [row.text for row in self.rows]
        if self.device.type != "cuda":
            return choice.ids.cpu(), choice.logprobs.cpu(), None, texts
        ids, logprobs = (x.to("cpu", non_blocking=True) for x in choice)
        there = torch.cuda.Event()
        there.record()
        return ids, logprobs, there, texts

    def _count(self) -> None:
        """A token of every text was begun; a text that has all of its own gives up its row."""
        for place, row in enumerate(self.rows):
            row.begun += row.text is not None
            if row.text and row.begun == row.text.limit:
                self.rows[place] = Row()

    def _look(
        self, ids: Tensor, logprobs: Tensor, there: object, texts: list[Completion | None]
    ) -> Iterator[tuple[Completion, int | None]]:
        if isinstance(there, torch.cuda.Event):
            there.synchronize()
        for text, token, logprob in zip(texts, ids.tolist(), logprobs.tolist(), strict=True):
            if text is None or text.stopped:
                continue
            if token < 0:
                raise CheckpointError(
                    "the model's logits are not finite: its training diverged; take an earlier "
                    "checkpoint"
                )
            if token == self.end:
                text.stopped = "end"
            else:
                text.tokens.append(token)
                text.logprobs.append(logprob)
                if len(text.tokens) == text.limit:
                    text.stopped = text.reason
            yield text, None if token == self.end else token
            if text.stopped:
                for place, row in enumerate(self.rows):
                    if row.text is text:
                        self.rows[place] = Row()


def _groups(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """Prompts that are prefilled together, the longest of each group first."""
    group: list[list[int]] = []
    for prompt in sorted(prompts, key=len, reverse=True):
        if group and len(prompt) < (1 - PADDED) * len(group[0]):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
