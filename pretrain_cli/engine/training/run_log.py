"""Files that a run writes while it trains: metrics.jsonl, samples.jsonl, and those of trackers.

Only the first rank writes. Samples use their own random generator with the same seed at every step:
two samples differ only by the model, and the random state of training is not touched.
"""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from pretrain_cli.engine.planning.plan import Plan, resolved
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runs.events import Emit, Event, Logged, Notice, Sample, Started
from pretrain_cli.engine.runs.metrics_file import MetricsFile, truncate_after
from pretrain_cli.engine.runs.trackers import Tracker, have_each, open_trackers, track
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.stop import Stopped, StopRequest
from pretrain_cli.engine.sampling.sample import sample_text
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.errors import PretrainError
from pretrain_cli.files import append_line, flush
from pretrain_cli.model.decoder import Decoder


class RunLog:
    """Metrics file, trackers and sample log of a run. Opened on the first rank; on others nothing
    is written."""

    def __init__(self, plan: Plan, run: Path, emit: Emit, tell: Emit) -> None:
        """Notices about an output go to `report`; notices about an output that is left out go to
        `tell` only."""
        self.plan, self.run, self.emit, self.tell = plan, run, emit, tell
        self.metrics: MetricsFile | None = None
        self.trackers: list[Tracker] = []

    @property
    def before(self) -> tuple[int, float]:
        """Return tokens and seconds of the run's earlier processes; see MetricsFile."""
        return self.metrics.before if self.metrics else (0, 0.0)

    def open(self, state: State) -> None:
        """Open the outputs, dropping lines beyond the state's step."""
        self.metrics = MetricsFile(
            self.run / "metrics.jsonl",
            lambda text: self.emit(Notice(text)),
            upto=state.step,
            rollbacks=state.rollbacks,
        )
        asked = resolved(self.plan).model_dump(mode="json")
        names = self.plan.settings.train.log if state.step < self.plan.steps else ()
        self.trackers = open_trackers(names, self.run, asked, self.emit, step=state.step)

    def begin(self, started: Started) -> None:
        if self.metrics:
            self.metrics.write(started)

    def take(self, event: Event) -> None:
        if self.metrics and isinstance(event, Logged):
            self.metrics.write(event)
        track(self.trackers, event, self.tell)

    def has_evaluated(self, step: int) -> bool:
        return self.metrics is not None and step in self.metrics.evaluated

    def flush(self) -> None:
        """Flush the trackers. Called before a checkpoint that counts on them."""
        have_each(self.trackers, lambda tracker: tracker.flush(), self.tell)

    def sync(self) -> None:
        """Flush to disk the lines that a checkpoint counts on."""
        if self.metrics:
            self.metrics.sync()

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
        have_each(self.trackers, lambda tracker: tracker.close(), self.tell)


class SampleLog:
    """Writes samples.jsonl on the first rank: a line per prompt and sampling step."""

    def __init__(self, plan: Plan, run: Path, ranks: Ranks, emit: Emit, *, upto: int) -> None:
        self.plan, self.ranks, self.emit = plan, ranks, emit
        self.path = run / "samples.jsonl"
        self.truncate_after(upto)
        self.settings = plan.settings.train
        self.possible = self.settings.sample_tokens > 0
        if self.possible and self.settings.parallel == "fsdp":
            self.possible = False
            emit(Notice("No samples: the model is sharded across the ranks. pretrain sample"))

    def truncate_after(self, step: int) -> None:
        """Drop lines after this step: those steps will run again."""
        rows = truncate_after(self.path, step) if self.ranks.is_first else []
        self.taken = {(row["step"], row["prompt"]) for row in rows}

    def due(self, step: int) -> bool:
        """Return whether samples are due at this step. They always are at the last step."""
        if not self.possible or step == 0:
            return False
        every = self.settings.sample_every
        return step == self.plan.steps or (every > 0 and step % every == 0)

    def take(self, decoder: Decoder, step: int, stop: StopRequest) -> None:
        """Take the samples of this step that are missing. Every rank must call this. Raises Stopped
        on every rank if a stop is requested; a resumed run takes the missing ones."""
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
        params = SamplingParams(max_tokens=self.settings.sample_tokens, seed=self.settings.seed)
        pieces = sample_text(decoder, self.plan.data.tokenizer, prompt, params)
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
