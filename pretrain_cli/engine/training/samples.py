"""Text from the model as it trains: from the same prompts at intervals, and at the end.

Drawn with a generator of its own, from the run's seed at every step: what changes from one to the
next is the model, and the run's own random numbers are left alone.
"""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from pretrain_cli.engine.planning.plan import Plan
from pretrain_cli.engine.runs.events import Emit, Notice, Sample, truncate_after
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.stop import Stopped, StopRequest
from pretrain_cli.engine.sampling.sample import sample_text
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.errors import PretrainError
from pretrain_cli.files import append_line, flush
from pretrain_cli.model.decoder import Decoder


class SampleLog:
    """samples.jsonl: a line for each prompt, each time. The first rank writes it."""

    def __init__(self, plan: Plan, run: Path, ranks: Ranks, emit: Emit, *, upto: int) -> None:
        self.plan, self.ranks, self.emit = plan, ranks, emit
        self.path = run / "samples.jsonl"
        self.truncate_after(upto)
        self.settings = plan.settings.train
        self.possible = self.settings.sample_tokens > 0
        if self.possible and self.settings.parallel == "fsdp":
            self.possible = False
            emit(Notice("No samples: the model is parted among the ranks. pretrain sample"))

    def truncate_after(self, step: int) -> None:
        """Lines beyond this step are of a future that was lost, and go."""
        rows = truncate_after(self.path, step) if self.ranks.is_first else []
        self.taken = {(row["step"], row["prompt"]) for row in rows}

    def due(self, step: int) -> bool:
        """Whether there are samples of this step. The last one always has them."""
        if not self.possible or step == 0:
            return False
        every = self.settings.sample_every
        return step == self.plan.steps or (every > 0 and step % every == 0)

    def take(self, decoder: Decoder, step: int, stop: StopRequest) -> None:
        """Those of this step that are not there yet; every rank calls this. Raises Stopped, on
        every rank, where a stop is asked for; what is missing is taken when the run goes on."""
        if self.ranks.is_first:
            decoder.eval()
            with contextlib.suppress(Stopped):
                for prompt in self.settings.sample_prompts:
                    if (step, prompt) not in self.taken:
                        self._take(decoder, step, prompt, stop)
        self.ranks.wait()
        if stop.agree():
            raise Stopped

    def _take(self, decoder: Decoder, step: int, prompt: str, stop: StopRequest) -> None:
        controls = SamplingParams(max_tokens=self.settings.sample_tokens, seed=self.settings.seed)
        pieces = sample_text(decoder, self.plan.data.tokenizer, prompt, controls)
        try:
            with torch.compiler.set_stance("force_eager"):  # each length would compile anew
                sample = Sample(step, prompt, "".join(stop.until_asked(pieces)))
        except PretrainError as error:  # nothing of the run depends on it
            self.emit(Notice(f"No sample: {error}"))
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                append_line(file, (json.dumps(asdict(sample)) + "\n").encode())
                flush(file)
        except OSError as error:
            self.emit(Notice(f"{self.path}: {error.strerror}; the sample below is not in it"))
        self.taken.add((step, prompt))
        self.emit(sample)
