"""Training: from datasets to a run folder with checkpoints, metrics and a sample.

open the ranks → plan → open the batches → build the model → set its weights → prepare it for speed
→ build the optimizer → resume → train_step until done or asked to stop, evaluating and saving when
due
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pretrain_cli.config import RunConfig
from pretrain_cli.data.batches import Batches
from pretrain_cli.engine import checkpoint
from pretrain_cli.engine.checkpoint import State
from pretrain_cli.engine.distributed import Ranks, gradients_kept, open_ranks, share
from pretrain_cli.engine.evaluate import evaluate
from pretrain_cli.engine.feed import Feed, open_batches
from pretrain_cli.engine.metrics import (
    Evaluation,
    Event,
    Finished,
    MetricsFile,
    Notice,
    Report,
    Sample,
    Saved,
    Started,
    StepMetrics,
    peak_memory,
    stated_peak,
)
from pretrain_cli.engine.optimizer import build_optimizer, learning_rate, set_learning_rate
from pretrain_cli.engine.plan import Plan, make_plan
from pretrain_cli.engine.record import Record
from pretrain_cli.engine.run import choose_folder, device_name, write_record
from pretrain_cli.engine.sample import Controls, sample_text
from pretrain_cli.engine.speed import apply_process_settings, build_model, compile_blocks
from pretrain_cli.engine.stop import StopRequest
from pretrain_cli.errors import CheckpointError, ConfigError, DataError, PretrainError
from pretrain_cli.model import counting
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.huggingface import load_weights


def train(
    settings: RunConfig,
    report: Report,
    *,
    resume: tuple[Path, Record] | None = None,
    resume_from: Path | None = None,
) -> Finished:
    """Train a new run, or go on with the run at `resume`, from a checkpoint of it where one is
    named and else from its newest intact one. Returns how it ended."""
    with open_ranks(settings.train.device) as ranks, StopRequest() as stop:
        if not ranks.is_first:
            report = _silent
        plan = make_plan(settings, ranks, report, model=resume[1].model if resume else None)
        run, start = _choose_run(plan, report, resume, resume_from)
        batches = open_batches(plan, ranks, report)
        torch.manual_seed(settings.train.seed)  # nothing draws from it yet; a checkpoint keeps it
        apply_process_settings(plan.speed)
        for decision in plan.speed.decisions.values():
            if decision.asked not in ("auto", decision.in_force):
                report(Notice(f"speed.{decision.setting}: {decision.in_force}, {decision.reason}"))

        decoder = build_model(plan.model, plan.speed, ranks.device)
        _set_weights(decoder, plan, start, report)
        compile_blocks(decoder, plan.speed)
        model = share(decoder, ranks, plan.settings.train.parallel)
        optimizer = build_optimizer(
            model, plan.settings.optimizer, fused=plan.speed.fused_optimizer
        )
        state = State(step=0, samples=0, tokens=0)
        if start is not None:
            state = checkpoint.load_training_state(start, decoder, optimizer, ranks.device)
        if state.step > plan.steps:
            raise ConfigError(
                f"train.steps: {plan.steps:,} is less than the {state.step:,} that {run} has; give "
                "more, or resume from an earlier checkpoint of it"
            )
        if ranks.is_first:
            write_record(run, plan, ranks.device, resume[1].asked if resume else None)
            for left in checkpoint.abandon_later(run, state.step):
                report(Notice(f"{left}: beyond step {state.step:,}, renamed to abandoned-…"))
        trainer = Trainer(plan, run, ranks, report, batches, decoder, model, optimizer)
        return trainer.run_until(plan.steps, state, stop)


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    micro_batch_size: int,
    clip: float,
    world: int = 1,
    counted: int | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step on this rank's share of its samples. -> (loss, gradient norm).

    inputs and targets (B, T) are taken `micro_batch_size` rows at a time, and with them `documents`
    (B, T), where attention is kept inside each. Each part's loss is its sum over a rank's part of
    the targets that count in the whole step, by default all, so the parts add up to the mean that
    one large batch would give; gradients are then averaged over the ranks. The loss returned is
    this rank's part of the mean over all ranks.
    """
    normalizer = targets.numel() if counted is None else counted / world
    model.train()
    total = torch.zeros((), device=inputs.device)
    for start in range(0, len(inputs), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        with gradients_kept(model, last=rows.stop >= len(inputs)):
            loss = model(
                inputs[rows],
                targets[rows],
                documents=None if documents is None else documents[rows],
                normalizer=normalizer,
            )
            loss.backward()
        total += loss.detach() / world
    limit = clip if clip > 0 else float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


class Trainer:
    """A run in progress: what is written, reported and saved around its steps."""

    def __init__(
        self,
        plan: Plan,
        run: Path,
        ranks: Ranks,
        report: Report,
        batches: Batches,
        decoder: Decoder,
        model: nn.Module,
        optimizer: Optimizer,
    ) -> None:
        self.plan, self.run, self.ranks, self.batches = plan, run, ranks, batches
        self.decoder, self.model, self.optimizer = decoder, model, optimizer
        self.tell = report
        self.saved_step = -1
        self.evaluated_step = -1
        self.metrics: MetricsFile | None = None

    def report(self, event: Event) -> None:
        if self.metrics and isinstance(event, StepMetrics | Evaluation):
            self.metrics.write(event)
        self.tell(event)

    def run_until(self, steps: int, state: State, stop: StopRequest) -> Finished:
        """Steps until there have been so many, or a stop is asked for; saved either way."""
        plan, ranks = self.plan, self.ranks
        if ranks.is_first:
            self.metrics = MetricsFile(self.run / "metrics.jsonl", upto=state.step)
        flops = counting.training_flops(plan.model, plan.seq_len).exact
        peak = stated_peak(ranks.device, plan.speed.compute_dtype)
        self.saved_step = state.step if state.step else -1
        self.report(
            Started(
                run=self.run,
                model=plan.name,
                parameters=counting.count_parameters(plan.model).total,
                dataset=plan.data.name,
                device=device_name(ranks.device),
                first_step=state.step,
                steps=steps,
                tokens_per_step=plan.tokens_per_step,
                flops_per_token=flops,
                peak_flops=peak,
            )
        )
        feed = Feed(
            self.batches,
            first_sample=state.samples,
            device=ranks.device,
            prefetch=plan.speed.prefetch,
        )
        first, stopped = state.step, False
        waited, since, mean, now = 0.0, 0, 0.0, 0.0
        if state.step >= steps:
            self.report(Notice(f"{self.run} has its {steps:,} steps; --steps with more goes on"))
        try:
            if self._missed_evaluation(state):
                self.evaluate(state)
            began = logged = time.perf_counter()
            while state.step < steps and not stopped:
                rate = learning_rate(
                    state.step,
                    peak=plan.learning_rate,
                    steps=steps,
                    warmup_steps=plan.warmup_steps,
                    settings=plan.settings.optimizer,
                )
                set_learning_rate(self.optimizer, rate)
                batch = feed.next()
                waited, since = waited + feed.wait, since + 1
                loss, norm = train_step(
                    self.model,
                    self.optimizer,
                    batch.inputs,
                    batch.targets,
                    micro_batch_size=plan.micro_batch_size,
                    clip=plan.settings.optimizer.clip,
                    world=ranks.world,
                    counted=batch.counted,
                    documents=batch.documents,
                )
                state = State(
                    step=state.step + 1,
                    samples=state.samples + plan.samples_per_step,
                    tokens=state.tokens + plan.tokens_per_step,
                )
                save_due = state.step % plan.checkpoint_every == 0
                log_due = state.step % plan.log_every == 0 or state.step == steps
                if log_due or save_due or (stop and ranks.world == 1):
                    mean = ranks.sum(loss).item()  # waits for the device
                    self._refuse_divergence(state, mean, float(norm))
                if log_due:
                    now = time.perf_counter()
                    speed = since * plan.tokens_per_step / (now - logged)
                    self.report(
                        StepMetrics(
                            step=state.step,
                            loss=mean,
                            learning_rate=rate,
                            gradient_norm=float(norm),
                            tokens=state.tokens,
                            tokens_per_second=speed,
                            mfu=speed * flops / (peak * ranks.world) if peak else None,
                            data_wait=waited / since,
                            memory=peak_memory(ranks.device),
                            seconds=now - began,
                            sources=self._tokens_by_source(state),
                        )
                    )
                    waited, since = 0.0, 0
                paused = time.perf_counter()
                if ranks.world == 1 or log_due or save_due:
                    stopped = ranks.any(bool(stop))
                if state.step % plan.eval_every == 0 and not stopped:
                    self.evaluate(state)
                if save_due:
                    self.save(state)
                logged = now if log_due else logged
                logged += time.perf_counter() - paused  # evaluating and saving are not training
            if state.step > first and not stopped:
                self.evaluate(state)
            self.save(state)
            if state.step > first and not stopped:
                self.sample(state)
        finally:
            feed.close()
            if self.metrics:
                self.metrics.close()
        finished = Finished(self.run, state.step, steps, "stopped" if stopped else "done")
        self.report(finished)
        return finished

    def _tokens_by_source(self, state: State) -> dict[str, int]:
        """Seen so far of each dataset, where there are several."""
        sources = self.plan.data.trained_on
        counts = self.batches.interleaving.counts(state.samples)
        tokens = [count * self.plan.seq_len for count in counts]
        names = [source.name for source in sources]
        return dict(zip(names, tokens, strict=True)) if len(self.plan.data.sources) > 1 else {}

    def _refuse_divergence(self, state: State, loss: float, norm: float) -> None:
        """Stop before weights that are not finite are saved over those that are."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise PretrainError(
                f"step {state.step}: loss {loss}, gradient norm {norm}; training diverged, this is "
                "not saved. Start again with a lower --learning-rate, or with --init-from an "
                f"earlier checkpoint of {self.run}"
            )

    def _missed_evaluation(self, state: State) -> bool:
        """Whether this run was stopped at a step whose evaluation was due, and is resumed there."""
        last = state.step == self.plan.steps
        due = state.step > 0 and (last or state.step % self.plan.eval_every == 0)
        done = self.metrics is not None and state.step in self.metrics.evaluated
        return due and self.ranks.any(self.ranks.is_first and not done)

    def evaluate(self, state: State) -> None:
        """Measure and report the validation loss, once for a step."""
        if self.evaluated_step == state.step:
            return
        self.model.eval()
        self.evaluated_step = state.step
        evaluation = evaluate(
            self.model,
            self.plan.data,
            step=state.step,
            seq_len=self.plan.seq_len,
            batch_size=self.plan.micro_batch_size,
            ranks=self.ranks,
            document_mask=self.plan.settings.data.document_mask,
        )
        if evaluation is not None:
            self.report(evaluation)

    def save(self, state: State) -> None:
        """Write a checkpoint, once for a step."""
        if self.saved_step == state.step:
            return
        if self.metrics:
            self.metrics.sync()
        folder = self.run / "checkpoints"
        path = checkpoint.save_checkpoint(
            folder,
            self.decoder,
            self.optimizer,
            state,
            tokenizer=self.plan.data.tokenizer,
            ranks=self.ranks,
        )
        self.saved_step = state.step
        if self.ranks.is_first:
            checkpoint.rotate(self.run, self.plan.settings.train.keep_checkpoints)
        self.report(Saved(state.step, path))

    def sample(self, state: State) -> None:
        """A text from the model as it is now, shown and kept in samples.jsonl."""
        train = self.plan.settings.train
        if train.sample_tokens and train.parallel == "fsdp":
            self.report(Notice("No sample: the model is parted among the ranks. pretrain sample"))
        if not train.sample_tokens or train.parallel == "fsdp":
            return
        if self.ranks.is_first:
            self.decoder.eval()
            controls = Controls(max_tokens=train.sample_tokens, seed=train.seed)
            pieces = sample_text(
                self.decoder, self.plan.data.tokenizer, train.sample_prompt, controls
            )
            try:
                with torch.compiler.set_stance("force_eager"):  # each length would compile anew
                    sample = Sample(state.step, train.sample_prompt, "".join(pieces))
            except PretrainError as error:  # nothing of the run depends on it
                self.report(Notice(f"No sample: {error}"))
            else:
                with (self.run / "samples.jsonl").open("a") as file:
                    file.write(json.dumps(asdict(sample)) + "\n")
                self.report(sample)
        self.ranks.wait()


def _choose_run(
    plan: Plan,
    report: Report,
    resume: tuple[Path, Record] | None,
    resume_from: Path | None,
) -> tuple[Path, Path | None]:
    """(run folder, checkpoint to start from or None). Nothing is written yet."""
    if resume is None:
        return choose_folder(plan), None
    run, record = resume
    if plan.data.fingerprint != record.data_fingerprint:
        raise DataError(
            f"{plan.data.name}: not the dataset that {run} was trained on; give "
            f"{record.data_name} with --data, or start a new run"
        )
    if resume_from and (reason := checkpoint.damage(resume_from)):
        raise CheckpointError(f"{reason}; resume from the run, {run}, to take another")
    start = resume_from or checkpoint.newest_intact(run, lambda text: report(Notice(text)))
    if start is None:
        report(Notice(f"{run}: no checkpoint yet; starting again from step 0"))
    return run, start


def _set_weights(decoder: Decoder, plan: Plan, start: Path | None, report: Report) -> None:
    """From the checkpoint, from the folder of --init-from, or drawn from the seed."""
    folder = start or plan.settings.model.init_from
    if folder is None:
        decoder.initialize(plan.settings.train.seed)
        return
    left_out = load_weights(decoder, folder)
    if left_out:
        report(
            Notice(f"{folder}: {len(left_out)} tensors are not the text model's: {left_out[0]}, …")
        )


def _silent(event: Event) -> None:
    """What ranks but the first report."""
