"""`pretrain train --resume`, and `--check-resume`, which tests that resuming is exact."""

from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.markup import escape

from pretrain_cli.commands.display import TrainDisplay, console

STOPPED = 75
"""Exit code of a run that stopped with steps left, on a signal or at --max-time, after saving:
EX_TEMPFAIL of sysexits.h, "try again". Schedulers can requeue the job on it."""


def prove_resume(settings: Any, steps: int, display: TrainDisplay, stop: Any) -> NoReturn:
    """Compare a resumed run with an uninterrupted one. Exits with code 0 if they are equal, else 1;
    STOPPED if the check itself was stopped."""
    from pretrain_cli.engine.runtime.stop import Stopped
    from pretrain_cli.engine.training.check_resume import check_resume

    try:
        found = check_resume(settings, steps, display, stop)
    except Stopped:
        raise typer.Exit(STOPPED) from None
    if found.difference:
        console.print(f"[red]Not equal.[/] First: {escape(found.difference)}", soft_wrap=True)
        raise typer.Exit(1)
    console.print(
        f"[green]Equal, bit for bit:[/] {found.numbers} logged numbers, {found.tensors} tensors of "
        "weights and optimizer",
        soft_wrap=True,
    )
    raise typer.Exit(0)


def resumed(
    resume: Path, flags: dict[str, Any], assignments: list[str], allow_change: bool
) -> tuple[Any, dict[str, Any]]:
    """Return the run's settings with the requested changes, and train()'s arguments `resume` (the
    run folder and its record) and `resume_from` (a checkpoint; None: the newest intact one)."""
    from pretrain_cli.config.build import build_config
    from pretrain_cli.engine.runs.run_yaml import read_record, resumed_settings
    from pretrain_cli.errors import CheckpointError

    if not resume.is_dir():
        raise CheckpointError(f"{resume}: no such run folder")
    checkpoint = None
    if resume.parent.name == "checkpoints":
        checkpoint, resume = resume, resume.parent.parent
    record = read_record(resume)
    base = {name: dict(section) for name, section in record.settings.items()}
    base["train"].pop("max_time", None)  # the limit of the earlier process only
    if flags["train.tokens"] is not None:
        base["train"].pop("steps")
    changed = build_config(base, flags, assignments)
    settings = resumed_settings(record, changed, allow_change=allow_change)
    return settings, {"resume": (resume, record), "resume_from": checkpoint}
