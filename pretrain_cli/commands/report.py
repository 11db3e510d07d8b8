"""`pretrain report`: write runs' curves as an HTML page, and optionally as a PNG."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pretrain_cli.commands.display import console, notice


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN…", help="Folders of runs.", show_default="the newest run"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page.", show_default="report.html in the run's folder; of several runs, here"
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Also draw the curves as a PNG; needs matplotlib.")
    ] = None,
) -> None:
    """Show runs in one HTML page that opens with no network.

    Shows loss and validation over tokens, time and steps; learning rate, gradient norm, throughput,
    memory, restarts, skipped steps, samples and settings. Compares several runs side by side.
    """
    from pretrain_cli.engine.report.writing import write_report

    for path in write_report(runs or [], out, png, notice):
        console.print(f"Written to {escape(str(path))}", soft_wrap=True)
