"""Continuous batching: many completions at once, in rows that are refilled as completions end.

Every turn is one decoding step for all rows (model/inference/decode.py), then one sampled token for
each row (sampler.py), both on the device. Completions wait in a queue. When a row's completion
ends, the row takes the next completion from the queue and its prompt is prefilled separately, so
short completions do not wait for long ones. Consecutive equal prompts are prefilled once.

On a GPU sampled tokens are fetched FETCH_LAG turns late, while the next ones are computed, so that
no turn waits for the CPU. Tokens sampled after a completion's end are dropped. Reaching the token
limit needs no fetch: the number of tokens is known.

Other completions in the batch change a completion only by rounding: a matrix product with a
different number of rows may sum in a different order. With greedy sampling, or with equal uniforms,
the chosen token differs only where two tokens are equally likely to within that rounding.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain_cli.engine.sampling.sampler import NextToken, SamplingParams, sample_next, uniforms
from pretrain_cli.errors import CheckpointError
from pretrain_cli.model.inference.decode import DecodeSession
from pretrain_cli.model.kv_cache import KVCache

FETCH_LAG = 4
"""Turns between sampling a token on a GPU and reading it on the CPU; 0 on other devices."""
MAX_PADDING = 0.25
"""Largest fraction of padding among prompts that are prefilled together."""


@dataclass
class Completion:
    """A prompt and the tokens generated for it."""

    number: int
    prompt: list[int]
    limit: int
    """Maximum number of tokens: the requested number, or the model's positions left for it."""
    reason: str
    """Value that `stopped` takes at the limit: max-tokens or positions."""
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: str = ""
    """Reason for ending: end, max-tokens, positions, or one the consumer sets; empty until then."""


@dataclass
class Row:
    """A row of the batch: its completion, None if free, and the tokens sampled for it."""

    completion: Completion | None = None
    sampled: int = 0


class Prefilled(NamedTuple):
    """A prompt, the cache and row that hold it, and the logits after its last token. (V,)"""

    prompt: list[int]
    cache: KVCache
    row: int
    logits: Tensor


class Fetch(NamedTuple):
    """Sampled tokens being copied to the CPU, and the completion of each row."""

    ids: Tensor
    logprobs: Tensor
    copied: torch.cuda.Event | None
    """Event after the copy; None if the device is not a GPU."""
    completions: list[Completion | None]


class ContinuousBatch:
    """Completions of one model, `rows` at a time."""

    def __init__(
        self,
        session: DecodeSession,
        params: SamplingParams,
        *,
        rows: int,
        capacity: int,
        eos: int,
        vocab_size: int,
    ) -> None:
        """Allocate the cache. `capacity`: tokens of the longest completion with its prompt. Ids
        >= `vocab_size` only pad the model's embedding and are never sampled."""
        self.session, self.params, self.eos, self.vocab_size = session, params, eos, vocab_size
        self.device = session.device
        self.rows = [Row() for _ in range(rows)]
        self.cache = session.new_cache(batch=rows, capacity=capacity)
        self.positions = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.uniforms = torch.zeros(rows, capacity, dtype=torch.float64, device=self.device)
        self.index = torch.zeros_like(self.positions)
        """Index of each row's next number in `uniforms`. (rows,)"""
        self.present: Tensor | None = None
        if params.repetition_penalty != 1:
            self.present = torch.zeros(rows, vocab_size, dtype=torch.bool, device=self.device)
        self.logits = torch.zeros(rows, vocab_size, device=self.device)
        self.fetch_lag = FETCH_LAG if self.device.type == "cuda" else 0
        self.prefilled: Prefilled | None = None
        """Newest prompt, kept while queued completions may share it."""

    @torch.no_grad()
    def run(self, completions: Iterable[Completion]) -> Iterator[tuple[Completion, int | None]]:
        """Yield each completion's tokens as they are sampled; None for its end-of-document token.
        The consumer may set `stopped` to end a completion. Raises CheckpointError if logits are not
        finite."""
        queue = deque(completions)
        waiting: deque[Fetch] = deque()
        ids: Tensor | None = None
        while True:
            if ids is not None and any(row.completion for row in self.rows):
                self._step(ids)
            self._fill(queue)
            if any(row.completion for row in self.rows):
                next_token = sample_next(
                    self.logits, self.params, self._next_uniforms(), self.present
                )
                ids = next_token.ids.clamp(min=0)
                if self.present is not None:
                    self.present.scatter_(1, ids.unsqueeze(-1), True)
                waiting.append(self._fetch(next_token))
                self._free_finished_rows()
            elif not waiting:
                return
            busy = any(row.completion for row in self.rows)
            while waiting and (len(waiting) > self.fetch_lag or not busy):
                yield from self._collect(waiting.popleft())
                busy = any(row.completion for row in self.rows)

    def _step(self, ids: Tensor) -> None:
        self.cache.reserve(
            max(len(r.completion.prompt) + r.sampled for r in self.rows if r.completion)
        )
        logits = self.session.step(self.cache, ids, self.positions)
        self.logits = logits[:, : self.vocab_size].float()
        self.positions += 1  # meaningless in free rows

    def _next_uniforms(self) -> Tensor:
        numbers = self.uniforms.gather(1, self.index.unsqueeze(-1)).squeeze(-1)
        self.index = (self.index + 1).clamp(max=self.uniforms.shape[1] - 1)
        return numbers

    def _fill(self, queue: deque[Completion]) -> None:
        """Put the next completions into the free rows, prefilling their prompts."""
        free = [number for number, row in enumerate(self.rows) if row.completion is None]
        starting = [(row, queue.popleft()) for row in free[: len(queue)]]
        if not starting:
            return
        ready = {} if self.prefilled is None else {tuple(self.prefilled.prompt): self.prefilled}
        prompts = {tuple(completion.prompt): completion.prompt for _, completion in starting}
        for group in _groups([prompt for key, prompt in prompts.items() if key not in ready]):
            cache = self.session.new_cache(
                batch=len(group), capacity=len(group[0]), ends=[len(prompt) for prompt in group]
            )
            logits = self.session.prefill(cache, group)[:, : self.vocab_size].float()
            for row, prompt in enumerate(group):
                ready[tuple(prompt)] = Prefilled(prompt, cache, row, logits[row])
        self.logits = self.logits.clone()  # may be the output buffer of a CUDA graph
        for row, completion in starting:
            self._begin(row, completion, ready[tuple(completion.prompt)])
        self.prefilled = ready[tuple(starting[-1][1].prompt)] if queue else None

    def _begin(self, row: int, completion: Completion, prefilled: Prefilled) -> None:
        prompt = completion.prompt
        self.rows[row] = Row(completion)
        self.cache.take(row, prefilled.cache, prefilled.row, len(prompt))
        self.logits[row] = prefilled.logits
        self.positions[row] = len(prompt)
        self.index[row] = 0
        if self.params.temperature > 0:
            numbers = uniforms(completion.seed, completion.limit)
            self.uniforms[row, : completion.limit] = numbers.to(self.device)
        if self.present is not None:
            self.present[row] = False
            self.present[row, torch.tensor(prompt, device=self.device)] = True

    def _fetch(self, next_token: NextToken) -> Fetch:
        """Start copying sampled tokens to the CPU."""
        completions = [row.completion for row in self.rows]
        if self.device.type != "cuda":
            return Fetch(next_token.ids.cpu(), next_token.logprobs.cpu(), None, completions)
        ids, logprobs = (x.to("cpu", non_blocking=True) for x in next_token)
        copied = torch.cuda.Event()
        copied.record()
        return Fetch(ids, logprobs, copied, completions)

    def _free_finished_rows(self) -> None:
        """Count the token sampled for each completion; free the rows of those at their limit."""
        for number, row in enumerate(self.rows):
            row.sampled += row.completion is not None
            if row.completion and row.sampled == row.completion.limit:
                self.rows[number] = Row()

    def _collect(self, fetch: Fetch) -> Iterator[tuple[Completion, int | None]]:
        """Append fetched tokens to their completions; free the rows of those that ended."""
        if fetch.copied is not None:
            fetch.copied.synchronize()
        for completion, token, logprob in zip(
            fetch.completions, fetch.ids.tolist(), fetch.logprobs.tolist(), strict=True
        ):
            if completion is None or completion.stopped:
                continue
            if token < 0:
                raise CheckpointError(
                    "the model's logits are not finite: its training diverged; take an earlier "
                    "checkpoint"
                )
            if token == self.eos:
                completion.stopped = "end"
            else:
                completion.tokens.append(token)
                completion.logprobs.append(logprob)
                if len(completion.tokens) == completion.limit:
                    completion.stopped = completion.reason
            yield completion, None if token == self.eos else token
            if completion.stopped:
                for number, row in enumerate(self.rows):
                    if row.completion is completion:
                        self.rows[number] = Row()


def _groups(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """Yield prompts to prefill together, the longest of each group first."""
    group: list[list[int]] = []
    for prompt in sorted(prompts, key=len, reverse=True):
        if group and len(prompt) < (1 - MAX_PADDING) * len(group[0]):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
