"""Slot `smoke`: a run of each family, from text to a model that transformers opens.

The two families run side by side, each in a process of its own.
"""

import math
import multiprocessing
from pathlib import Path

from gpu.check import Check
from gpu.shapes import smaller

FAMILIES = ("gemma3-tiny", "qwen3-tiny")
STEPS, MORE = 20, 4
VERSE = (
    "{n} green bottles hanging on the wall,\n"
    "And if one green bottle should accidentally fall,\n"
    "There'll be {less} green bottles hanging on the wall.\n"
)


def run(check: Check) -> None:
    fork = multiprocessing.get_context("fork")  # the GPU is not in use yet
    processes = [fork.Process(target=one_family, args=(check, name)) for name in FAMILIES]
    for process in processes:
        process.start()
    for process, name in zip(processes, FAMILIES, strict=True):
        process.join()
        if process.exitcode:
            check.write(name, ok=False, error=f"its process ended with {process.exitcode}")


def one_family(check: Check, model: str) -> None:
    """Train, resume, sample and verify a model. Each part needs the one before it."""
    from pretrain_cli.api import generate, load_model, tokenize, train
    from pretrain_cli.engine.evaluation.compare_transformers import verify
    from pretrain_cli.engine.runs.events import Event, StepMetrics

    folder = check.scratch / model
    losses: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, StepMetrics):
            losses.append(event.loss)

    with check.arm(f"{model}, train {STEPS} steps") as figures:
        dataset = tokenize(write_corpus(folder), tokenizer="bytes", out=folder / "data", workers=1)
        settings = {
            "model.name": model,
            "data.path": str(dataset.path),
            "data.seq_len": 128,
            "optimizer.learning_rate": 3e-3,
            "train.device": check.device,
            "train.steps": STEPS,
            "train.micro_batch_size": 2 if check.rehearse else 8,
            "train.tokens_per_step": 512 if check.rehearse else 4096,
            "train.log_every": 1,
            "train.checkpoint_every": STEPS // 2,
            "train.eval_every": STEPS // 2,
            "train.eval_tokens": 2048,
            "train.sample_tokens": 8,
            "train.out": str(folder / "run"),
        }
        if check.rehearse:
            settings |= {f"model.{field}": value for field, value in smaller(model).items()}
        finished = train(settings, on_event=note)
        figures["first_loss"], figures["last_loss"] = losses[0], losses[-1]
        figures["ok"] = finished.reason == "done" and losses[-1] < losses[0]
    with check.arm(f"{model}, resume for {MORE} more") as figures:
        before = len(losses)
        resumed = train(
            {"train.steps": STEPS + MORE}, on_event=note, resume=folder / "run", allow_change=True
        )
        figures["first_loss"], figures["last_loss"] = losses[before], losses[-1]
        went_on = len(losses) - before == MORE and resumed.step == STEPS + MORE
        figures["ok"] = went_on and all(map(math.isfinite, losses))
    with check.arm(f"{model}, sample") as figures:
        opened = load_model(folder / "run", device=check.device)
        [figures["text"]] = generate(opened, "There'll be ", max_tokens=24, seed=1)
        figures["ok"] = len(figures["text"]) > 0
    with check.arm(f"{model}, transformers opens the checkpoint") as figures:
        found = verify(
            folder / "run",
            against=None,
            data=None,
            windows=2,
            seq_len=128,
            greedy=16,
            device=check.device,
            best=False,
            notify=print,
        )
        figures["logit_error"], figures["bound"] = found.logits, found.tolerance
        figures["ok"] = found.passed


def write_corpus(folder: Path) -> Path:
    """Write short texts into a new folder `corpus` and return it."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for number in range(120):
        (corpus / f"{number:03}.txt").write_text(VERSE.format(n=number, less=number - 1) * 3)
    return corpus
