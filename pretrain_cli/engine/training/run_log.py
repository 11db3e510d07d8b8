"""A run's events on their way to its files and to the caller, and samples while it trains.

Only the first rank writes files. Samples use their own random generator with the same seed at every
step: two samples differ only by the model, and the random state of training is not touched.
"""

import contextlib
from pathlib import Path

import torch

from pretrain_cli.engine.planning.plan import Plan, resolved
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runs.events import Emit, Notice, Sample
from pretrain_cli.engine.runs.metrics_file import MetricsFile
from pretrain_cli.engine.runs.samples_file import SamplesFile
from pretrain_cli.engine.runs.sinks import Sinks
from pretrain_cli.engine.runs.trackers import open_trackers
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.stop import Stopped, StopRequest
from pretrain_cli.engine.sampling.sample import sample_text
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.engine.training.job import Job
from pretrain_cli.errors import PretrainError


class RunLog(Sinks):
    """Sinks of a run: metrics, samples and trackers on the first rank, and the caller."""

    def __init__(self, plan: Plan, run: Path, ranks: Ranks, caller: Emit, state: State) -> None:
        """Open the files of the run, dropping lines beyond the state's step."""
        super().__init__(caller)
        self.plan, self.run, self.ranks = plan, run, ranks
        self.metrics: MetricsFile | None = None
        self.samples: SamplesFile | None = None
        self.open(state)

    def open(self, state: State) -> None:
        """Open the files. After a roll-back, call `close` first."""
        if not self.ranks.is_first:
            return
        self.metrics = MetricsFile(
            self.run / "metrics.jsonl",
            self.remarks.append,
            upto=state.step,
            rollbacks=state.rollbacks,
        )
        self.samples = SamplesFile(self.run / "samples.jsonl", self.remarks.append, upto=state.step)
        self.sinks = [self.metrics, self.samples]
        settings = resolved(self.plan).model_dump(mode="json")
        names = self.plan.settings.train.log if state.step < self.plan.steps else ()
        self.sinks += open_trackers(names, self.run, settings, self.emit, step=state.step)

    @property
    def before(self) -> tuple[int, float]:
        """Return tokens and seconds of the run's earlier processes; see MetricsFile."""
        return self.metrics.before if self.metrics else (0, 0.0)

    def notify(self, text: str) -> None:
        """Emit a notice."""
        self.emit(Notice(text))

    def has_evaluated(self, step: int) -> bool:
        return self.metrics is not None and step in self.metrics.evaluated

    def has_sampled(self, step: int, prompt: str) -> bool:
        return self.samples is not None and (step, prompt) in self.samples.taken

    def sync(self) -> None:
        """Flush to disk the lines that a checkpoint counts on. Raises OSError. Called from the
        thread that writes the checkpoint."""
        if self.metrics:
            self.metrics.sync()


class Sampling:
    """Samples text from the model in training when it is due."""

    def __init__(self, job: Job[Plan], log: RunLog, stop: StopRequest) -> None:
        self.job, self.log, self.stop = job, log, stop
        self.settings = job.plan.settings.train
        self.possible = self.settings.sample_tokens > 0
        if self.possible and self.settings.parallel == "fsdp":
            self.possible = False
            log.notify("No samples: the model is sharded across the ranks. pretrain sample")

    def due(self, step: int) -> bool:
        """Return whether samples are due at this step. They always are at the last step."""
        if not self.possible or step == 0:
            return False
        every = self.settings.sample_every
        return step == self.job.plan.steps or (every > 0 and step % every == 0)

    def take(self, step: int) -> None:
        """Take the samples of this step that are missing. Every rank must call this. Raises Stopped
        on every rank if a stop is requested; a resumed run takes the missing ones."""
        if self.job.ranks.is_first:
            self.job.decoder.eval()
            with contextlib.suppress(Stopped):
                for prompt in self.settings.sample_prompts:
                    if not self.log.has_sampled(step, prompt):
                        self._take(step, prompt)
        self.job.ranks.wait()
        if self.stop.agree():
            raise Stopped

    def _take(self, step: int, prompt: str) -> None:
        params = SamplingParams(max_tokens=self.settings.sample_tokens, seed=self.settings.seed)
        pieces = sample_text(self.job.decoder, self.job.plan.data.tokenizer, prompt, params)
        try:
            with torch.compiler.set_stance("force_eager"):  # each length would compile anew
                text = "".join(self.stop.until_asked(pieces))
        except PretrainError as error:  # nothing of the run depends on it
            self.log.notify(f"No sample: {error}")
            return
        self.log.emit(Sample(step, prompt, text))
