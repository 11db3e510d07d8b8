"""`pretrain train --lr-find`: a learning rate, suggested by a short test."""

from pathlib import Path
from typing import Any

from pretrain_cli.commands.display import TrainDisplay, console
from pretrain_cli.errors import ConfigError

RANGE_TEST_STEPS = 100
LINES = 20
"""Number of steps printed during the test; lr-find.json has every step."""


def refuse_meaningless(resume: Path | None, flags: dict[str, Any]) -> None:
    """Refuse options that have no meaning in a learning-rate range test."""
    if resume is not None:
        raise ConfigError(f"--resume: {resume} does not go with --lr-find, which starts a new run")
    for name in ("optimizer.learning_rate", "optimizer.schedule", "train.tokens"):
        if flags[name] is not None:
            option = "--" + name.partition(".")[2].replace("_", "-")
            raise ConfigError(f"{option}: {flags[name]} does not go with --lr-find; leave it out")


def suggest_rate(settings: Any, out: Path | None, display: TrainDisplay, stop: Any) -> None:
    """Run the test and print the suggested learning rate."""
    from pretrain_cli.engine.training.lr_find import find_learning_rate

    folder = out or Path()
    test = find_learning_rate(settings, folder, display, _progress, stop)
    if test is None:
        return
    files = ", ".join(str(path) for path in sorted(folder.glob("lr-find.*")))
    found = "None" if test.suggestion is None else f"{test.suggestion:g}"
    console.print(f"[green]Suggested learning rate:[/] {found}: {test.reason}", soft_wrap=True)
    console.print(f"[dim]{files}[/]", soft_wrap=True)


def _progress(step: int, steps: int, rate: float, loss: float) -> None:
    if step % max(1, steps // LINES) == 0:
        console.print(f"step {step:,}/{steps:,}  lr {rate:.2e}  loss {loss:.4f}", soft_wrap=True)
