"""`pretrain benchmark data`: how fast batches are read."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pretrain_cli.commands.display import check_output, console, notice, write_json
from pretrain_cli.commands.display import size as in_bytes
from pretrain_cli.units import amount

GIGABYTES = 2.0
SEQ_LEN = 1024
SAMPLES = 8


def benchmark_data(
    data: Annotated[
        str | None, typer.Option(help="Read this dataset.", show_default="made, of --size")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of the .bin files of --data.")
    ] = None,
    size: Annotated[float | None, typer.Option(help="GB to make.", show_default="2")] = None,
    packing: Annotated[
        str | None, typer.Option(help="concat or best-fit.", show_default="concat")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a sample.", show_default="1024")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--micro-batch-size", help="Samples a batch.", show_default="8"),
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file.")
    ] = None,
) -> None:
    """Time the reading of batches from a warm page cache, of a given dataset or of a temporary
    synthetic one."""
    from pretrain_cli.config.build import build_config
    from pretrain_cli.errors import ConfigError

    check_output(as_json)
    flags = {"data.seq_len": seq_len, "data.packing": packing, "train.micro_batch_size": samples}
    asked = build_config({}, flags, [])
    if data is not None and size is not None:
        raise ConfigError(f"--size: {size:g} GB is of what is made; leave it out with --data")
    if data is None and tokenizer is not None:
        raise ConfigError(f"--tokenizer: '{tokenizer}' says what made the .bin files of --data")
    if size is not None and not 0 < size < float("inf"):
        raise ConfigError(f"--size: {size:g} is not above 0")

    from pretrain_cli.engine.benchmark import data as engine
    from pretrain_cli.engine.planning.data_and_model import open_path

    workload = engine.Workload(
        seq_len=seq_len or SEQ_LEN, samples=samples or SAMPLES, packing=asked.data.packing
    )
    if data is not None:
        place = nullcontext(open_path(data, tokenizer, notice).train)
    else:
        place = engine.made_split(int((size or GIGABYTES) * 1e9))
    with console.status("reading"), place as split:
        result = engine.measure(split, workload)
    console.print(
        f"{escape(data or 'Random tokens')}, {in_bytes(result.size)} in the page cache, one "
        f"thread\nIn order: {amount(result.tokens_per_second)} tokens/s. At random: "
        f"{result.batch_seconds * 1e6:.0f} µs a batch of {workload.samples} × {workload.seq_len}",
        soft_wrap=True,
    )
    if result.index_seconds is not None:
        console.print(
            f"Best-fit packing of {amount(result.tokens)} tokens: {result.index_seconds:.1f} s, "
            f"once; {result.filled:.2%} of places filled",
            soft_wrap=True,
        )
    if as_json is not None:
        write_json(as_json, {"data": data, "workload": asdict(workload), "result": asdict(result)})
