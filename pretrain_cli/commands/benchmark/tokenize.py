"""`pretrain benchmark tokenize`: how fast text is tokenized."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pretrain_cli.commands.display import check_output, console, write_json
from pretrain_cli.units import amount, size


def benchmark_tokenize(
    tokenizers: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="Tokenizers, several with commas.",
            show_default="the published ones",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Tokenize these files. Repeatable.", show_default="Python's own sources"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds: how often each is measured.")] = 3,
    workers: Annotated[
        int | None,
        typer.Option(help="Number of processes.", show_default="as pretrain tokenize has"),
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file.")
    ] = None,
) -> None:
    """Time `pretrain tokenize`, in turn with the tokenizers library and gigatoken alone, which have
    the same text in memory."""
    from pretrain_cli.data.tokenizers.tokenizer import HUB
    from pretrain_cli.engine.benchmark.tokenize import measure, request_for
    from pretrain_cli.errors import ConfigError

    if rounds < 1:
        raise ConfigError(f"--rounds: {rounds} is not at least 1")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers: {workers} is not at least 1")
    check_output(as_json)
    names = [name.strip() for name in tokenizers.split(",")] if tokenizers else list(HUB)
    results = []
    with console.status("reading") as status:
        for name in names:
            request = request_for(tuple(text or ()), name, workers)
            results.append(measure(request, rounds, status.update))
    table = Table(
        title=f"{size(results[0].bytes)} of text, {results[0].workers} workers, medians of "
        f"{rounds} rounds",
        title_justify="left",
    )
    table.add_column("tokenizer")
    for heading in ("pretrain tokenize", "tokens"):
        table.add_column(heading, justify="right")
    table.add_column("encoder")
    for heading in ("tokenizers alone", "ratio", "gigatoken alone", "ratio"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.tokenizer,
            f"{result.bytes / result.seconds / 1e6:.1f} MB/s",
            f"{amount(result.tokens / result.seconds)}/s",
            result.encoder,
            f"{result.bytes / result.library_seconds / 1e6:.1f} MB/s",
            f"{result.ratio:.2f}",
            f"{result.bytes / result.gigatoken_seconds / 1e6:.1f} MB/s"
            if result.gigatoken_seconds
            else "",
            f"{result.gigatoken_ratio:.2f}" if result.gigatoken_ratio else "",
        )
    console.print(table)
    if as_json is not None:
        write_json(
            as_json,
            {
                "results": [
                    asdict(r) | {"ratio": r.ratio, "gigatoken_ratio": r.gigatoken_ratio}
                    for r in results
                ]
            },
        )
