"""`pretrain benchmark tokenize`: how fast text is tokenized."""

from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from pretrain_cli.amounts import amount, size
from pretrain_cli.commands.display import console, write_json


def benchmark_tokenize(
    tokenizers: str | None,
    text: list[str] | None,
    rounds: int,
    workers: int | None,
    as_json: Path | None,
) -> None:
    """Measure each tokenizer beside the library, and show and write what was measured."""
    from pretrain_cli.data.tokenizer import HUB
    from pretrain_cli.engine.benchmark_tokenize import measure, request_for
    from pretrain_cli.errors import ConfigError

    if rounds < 1:
        raise ConfigError(f"--rounds: {rounds} is not at least 1")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers: {workers} is not at least 1")
    names = tokenizers.split(",") if tokenizers else list(HUB)
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
    for heading in ("pretrain tokenize", "tokens", "library, in memory", "ratio"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.tokenizer,
            f"{result.bytes / result.seconds / 1e6:.1f} MB/s",
            f"{amount(result.tokens / result.seconds)}/s",
            f"{result.bytes / result.library_seconds / 1e6:.1f} MB/s",
            f"{result.ratio:.2f}",
        )
    console.print(table)
    if as_json is not None:
        write_json(as_json, {"results": [asdict(r) | {"ratio": r.ratio} for r in results]})
