"""`pretrain sample`: text from a checkpoint, as it is made."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pretrain_cli.commands.display import console, error_console, notice


def sample(
    where: Annotated[
        Path | None,
        typer.Argument(
            help="A run, a checkpoint or a Hugging Face model folder.",
            show_default="the newest run",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text to go on from; '-' reads standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest continuation.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Of the likeliest K tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Of the likeliest tokens that make up P only.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    n: Annotated[int, typer.Option("--n", help="How many texts.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto.")] = "auto",
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Remember keys and values.")
    ] = True,
) -> None:
    """Write text with a trained model.

    It ends at the end-of-document token or after --max-tokens.
    """
    from pretrain_cli.engine.sample import Controls, open_for_sampling, sample_text
    from pretrain_cli.errors import ConfigError

    if n < 1:
        raise ConfigError(f"--n: {n} is not at least 1")
    controls = [
        Controls(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed + number,
            use_cache=cache,
        )
        for number in range(n)
    ]
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read()
    folder, model, tokenizer = open_for_sampling(where, device=device, dtype=dtype, report=notice)
    error_console.print(f"[dim]{folder}[/]", soft_wrap=True)
    try:
        for number, control in enumerate(controls):
            if n > 1:
                console.rule(f"{number + 1} of {n}")
            console.print(f"[dim]{_escaped(prompt or '')}[/]", end="", soft_wrap=True)
            for piece in sample_text(model, tokenizer, prompt or "", control):
                console.print(piece, end="", markup=False, soft_wrap=True)
            console.print()
    except KeyboardInterrupt:
        console.print()
        raise typer.Exit(130) from None


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
