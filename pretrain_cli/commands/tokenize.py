"""`pretrain tokenize`: text to a tokenized dataset."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pretrain_cli.commands.display import TokenizeProgress, console, notice, size


def tokenize(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files and folders of text; folders are searched to the bottom.",
            show_default="Python's own sources",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="gemma3, qwen3, gpt2, llama2; a tokenizer.json or its folder; a hub id; "
            "'bytes'; or 'bpe', trained on this text.",
            show_default="gemma3; bpe for Python's own sources",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Size of the 'bpe' vocabulary.", show_default="8192")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Dataset folder.", show_default="data/NAME OF THE CORPUS")
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Share of the documents held out for validation.", show_default="0.01"),
    ] = None,
    text_key: Annotated[
        str | None, typer.Option(help="Key of the text in .jsonl lines.", show_default="text")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Tokenize again, replacing what is there.")
    ] = False,
) -> None:
    """Turn text into a dataset to train on.

    A document is a file, or a line of a .jsonl file. Files that are not UTF-8 are skipped and
    named. Without any text, a small demo dataset is made of the Python standard library's sources.
    """
    from pretrain_cli.data.tokenize import TokenizeRequest, demo_request
    from pretrain_cli.data.tokenize import tokenize as run

    if paths:
        request = TokenizeRequest(
            paths=tuple(paths),
            out=Path("data") / _name(paths[0].resolve()),
            tokenizer="gemma3",
        )
    else:
        request = demo_request()
    given = {
        "out": out,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "val_fraction": val_fraction,
        "text_key": text_key,
        "force": force,
    }
    if tokenizer is not None and vocab_size is None:
        request = replace(request, vocab_size=None)
    request = replace(request, **{k: value for k, value in given.items() if value is not None})
    with TokenizeProgress() as progress:
        result = run(request, progress)
    manifest = result.manifest
    folder = escape(str(result.folder))
    if result.was_there:
        console.print(
            f"{folder} is up to date: the corpus and the options are unchanged. "
            "Tokenize again with --force.",
            soft_wrap=True,
        )
    if result.skipped:
        shown = ", ".join(str(path) for path in result.skipped[:3])
        more = f" and {len(result.skipped) - 3} more" if len(result.skipped) > 3 else ""
        notice(f"Skipped {len(result.skipped)} files that are not UTF-8: {shown}{more}")
    text = manifest.total("train", "bytes") + manifest.total("val", "bytes")
    tokens = manifest.total("train", "tokens") + manifest.total("val", "tokens")
    documents = manifest.total("train", "documents") + manifest.total("val", "documents")
    console.print(
        f"[bold]{folder}[/]: {tokens:,} tokens of {escape(manifest.tokenizer)} "
        f"({manifest.total('val', 'tokens'):,} for validation) from {documents:,} documents, "
        f"{size(text)} of text, {text / tokens:.2f} bytes a token",
        soft_wrap=True,
    )
    if not result.was_there:
        console.print(f"Train on it: pretrain train --data {folder}", soft_wrap=True)


def _name(path: Path) -> str:
    """What its dataset is called: `input` of input.txt, `wiki.en` of the folder wiki.en."""
    return (path.stem if path.is_file() else path.name) or "corpus"
