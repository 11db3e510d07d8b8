"""`pretrain verify`: compare a model with the same folder opened by transformers."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pretrain_cli.commands.display import console, notice, remark


def verify(
    where: Annotated[
        Path | None,
        typer.Argument(
            help="A run, a checkpoint or a Hugging Face model folder.",
            show_default="the newest run",
        ),
    ] = None,
    best: Annotated[
        bool,
        typer.Option("--best", help="Use the run's checkpoint with the lowest validation loss."),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Model folder that transformers opens, such as an export.",
            show_default="the same folder",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Compare on windows of this dataset.", show_default="random tokens"),
    ] = None,
    windows: Annotated[int, typer.Option(help="How many.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 128,
    greedy: Annotated[int, typer.Option(help="Greedy tokens to compare.")] = 24,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Compare logits, loss and greedy text with transformers'; exit 1 if they differ.

    Both compute in float32. The relative tolerance is 1e-4. If the folders' weight types differ, it
    allows for rounding the weights: 5e-3 with float16, 5e-2 with bfloat16.
    """
    from pretrain_cli.engine.evaluation import compare_transformers as engine

    verdict = engine.verify(
        where,
        against=against,
        data=data,
        windows=windows,
        seq_len=seq_len,
        greedy=greedy,
        device=device,
        best=best,
        notify=remark if as_json else notice,
    )
    if as_json:
        from dataclasses import asdict

        facts = asdict(verdict) | {"passed": verdict.passed}
        typer.echo(json.dumps(facts, indent=2, default=str))
    else:
        table = Table()
        for heading in (f"on {escape(verdict.source)}", "pretrain", "transformers", "difference"):
            table.add_column(heading, justify="right")
        table.add_row("logits, relative", "", "", f"{verdict.logits:.2e}")
        table.add_row("logits, largest", "", "", f"{verdict.largest:.2e}")
        difference = abs(verdict.loss - verdict.their_loss)
        table.add_row(
            "loss", f"{verdict.loss:.6f}", f"{verdict.their_loss:.6f}", f"{difference:.2e}"
        )
        said = f"{verdict.agreed} of {verdict.greedy}" + (", then a tie" if verdict.is_tie else "")
        table.add_row("greedy tokens alike", "", "", said)
        console.print(
            f"[bold]{escape(str(verdict.folder))}[/] and transformers on "
            f"{escape(str(verdict.against))}, {verdict.tokens:,} tokens",
            soft_wrap=True,
        )
        console.print(table)
        console.print(f"[dim]pretrain:[/] {escape(repr(verdict.text))}", soft_wrap=True)
        console.print(f"[dim]transformers:[/] {escape(repr(verdict.their_text))}", soft_wrap=True)
        word = "[green]The same" if verdict.passed else "[red]Not the same"
        console.print(f"{word}[/] to a tolerance of {verdict.tolerance:g}")
    if not verdict.passed:
        raise typer.Exit(1)
