"""`pretrain train --check-resume`, which tests that resuming is exact."""

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
