"""`pretrain export`: write a checkpoint as a folder or a GGUF file to publish."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pretrain_cli.commands.display import console, notice

SHARD = "5GB"


def export(
    where: Annotated[Path, typer.Argument(help="A run, a checkpoint or a model folder.")],
    out: Annotated[Path, typer.Argument(help="The folder, or .gguf file, to write.")],
    best: Annotated[
        bool,
        typer.Option("--best", help="Use the run's checkpoint with the lowest validation loss."),
    ] = False,
    dtype: Annotated[str, typer.Option(help="Type of the weights: bf16, fp16 or fp32.")] = "bf16",
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            help="Largest size of a weights file; larger weights are split.", show_default=SHARD
        ),
    ] = None,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write one file for llama.cpp instead of a folder.")
    ] = False,
) -> None:
    """Write a model for others: weights, tokenizer, configuration and a model card.

    Nothing is overwritten.
    """
    if gguf:
        _as_gguf(where, out, best, dtype, max_shard_size)
        return
    from pretrain_cli.config.setting_types import in_bytes
    from pretrain_cli.errors import ConfigError

    try:
        limit = in_bytes(max_shard_size or SHARD)
    except ValueError:
        raise ConfigError(
            f"--max-shard-size: '{max_shard_size}' is not a size; give 5GB or 500MB"
        ) from None
    from pretrain_cli.engine.export import export as engine

    folder = engine.export(where, out, dtype=dtype, max_shard_size=limit, best=best, notify=notice)
    written = sorted(out.glob("*.safetensors"))
    files = "1 file" if len(written) == 1 else f"{len(written)} files"
    console.print(
        f"[green]{escape(str(out))}[/]: {escape(str(folder))} in {dtype}, weights in {files}",
        soft_wrap=True,
    )
    console.print(
        f"See that it is the same: pretrain verify {escape(str(folder))} --against "
        f"{escape(str(out))}",
        soft_wrap=True,
    )


def _as_gguf(where: Path, out: Path, best: bool, dtype: str, max_shard_size: str | None) -> None:
    from pretrain_cli.engine.export.gguf import export_gguf
    from pretrain_cli.errors import ConfigError
    from pretrain_cli.units import size

    if max_shard_size is not None:
        raise ConfigError("--max-shard-size: --gguf writes one file; leave one of them out")
    folder = export_gguf(where, out, dtype=dtype, best=best, notify=notice)
    console.print(
        f"[green]{escape(str(out))}[/]: {escape(str(folder))} in {dtype}, "
        f"{size(out.stat().st_size)}",
        soft_wrap=True,
    )
