"""`pretrain sample`: text from a checkpoint, as it is made."""

import select
import sys
from itertools import chain
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.markup import escape

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
        str | None,
        typer.Option(help="Text to go on from, or piped in; '-' waits for standard input."),
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
    from pretrain_cli.engine.process import wait_passively

    wait_passively("auto")
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
    if prompt == "-" or (prompt is None and _is_waiting(sys.stdin)):
        prompt = sys.stdin.read()
    folder, model, tokenizer = open_for_sampling(where, device=device, dtype=dtype, report=notice)
    error_console.print(f"[dim]{escape(str(folder))}[/]", soft_wrap=True)
    try:
        for number, control in enumerate(controls):
            if n > 1:
                console.rule(f"{number + 1} of {n}")
            pieces = sample_text(model, tokenizer, prompt or "", control)
            first = next(pieces, "")  # a prompt that is refused is refused before it is shown
            _write(typer.style(prompt or "", dim=True) if console.is_terminal else prompt or "")
            for piece in chain((first,), pieces):
                _write(piece)
            console.print()
    except KeyboardInterrupt:
        console.print()
        raise typer.Exit(130) from None


def _is_waiting(stream: TextIO) -> bool:
    """Whether something was piped in. A pipe that stays open and empty, as a program that starts
    this one may leave, is not waited for; `--prompt -` waits."""
    if stream.isatty():
        return False
    try:
        return bool(select.select([stream], [], [], 0)[0])
    except (OSError, ValueError):  # not a file that can be asked
        return True


def _write(text: str) -> None:
    """As it is: rich would turn tabs into spaces and `:x:` into a picture."""
    sys.stdout.write(text)
    sys.stdout.flush()
