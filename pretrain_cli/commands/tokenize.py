"""`pretrain tokenize`: text to a tokenized dataset."""

from pathlib import Path
from typing import Annotated

import typer

from pretrain_cli.commands.display import TokenizeProgress, console, notice, size


def tokenize(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Files and folders of text; folders are searched to the bottom."),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="gemma3, qwen3, gpt2, llama2; a tokenizer.json or its folder; a hub id; "
            "'bytes'; or 'bpe', trained on this text."
        ),
    ] = "gemma3",
    vocab_size: Annotated[
        int | None, typer.Option(help="Size of the 'bpe' vocabulary.", show_default="8192")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Dataset folder.", show_default="data/NAME OF THE CORPUS")
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(help="Share of the documents held out for validation.")
    ] = 0.01,
    text_key: Annotated[str, typer.Option(help="Key of the text in .jsonl lines.")] = "text",
    force: Annotated[
        bool, typer.Option("--force", help="Tokenize again, replacing what is there.")
    ] = False,
) -> None:
    """Turn text into a dataset to train on.

    A document is a file, or a line of a .jsonl file. Files that are not UTF-8 are skipped and
    named.
    """
    from pretrain_cli.data.tokenize import TokenizeRequest
    from pretrain_cli.data.tokenize import tokenize as run

    request = TokenizeRequest(
        paths=tuple(paths),
        out=out or Path("data") / (paths[0].resolve().stem or "corpus"),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        text_key=text_key,
        force=force,
    )
    with TokenizeProgress() as progress:
        result = run(request, progress)
    manifest = result.manifest
    if result.was_there:
        console.print(
            f"{result.folder} is up to date: the corpus and the options are unchanged. "
            "Tokenize again with --force."
        )
    if result.skipped:
        shown = ", ".join(str(path) for path in result.skipped[:3])
        more = f" and {len(result.skipped) - 3} more" if len(result.skipped) > 3 else ""
        notice(f"Skipped {len(result.skipped)} files that are not UTF-8: {shown}{more}")
    text = manifest.total("train", "bytes") + manifest.total("val", "bytes")
    tokens = manifest.total("train", "tokens") + manifest.total("val", "tokens")
    documents = manifest.total("train", "documents") + manifest.total("val", "documents")
    console.print(
        f"[bold]{result.folder}[/]: {tokens:,} tokens of {manifest.tokenizer} "
        f"({manifest.total('val', 'tokens'):,} for validation) from {documents:,} documents, "
        f"{size(text)} of text, {text / tokens:.2f} bytes a token",
        soft_wrap=True,
    )
    if not result.was_there:
        console.print(f"Train on it: pretrain train --data {result.folder}", soft_wrap=True)
