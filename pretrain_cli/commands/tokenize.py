"""`pretrain tokenize`: turn text into a tokenized dataset."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from pretrain_cli.commands.display import TokenizeProgress, console, notice, size
from pretrain_cli.errors import ConfigError

if TYPE_CHECKING:
    from pretrain_cli.data.shards import Manifest

CORPUS = "What is read"
SPLITS = "What a document becomes"
OUTPUT = "What is written"
MACHINES = "On several machines"
TAKEN_BY_MERGE = ("paths", "out", "force", "merge")


def tokenize(
    ctx: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders and patterns of text; - is standard input; "
            "hf:OWNER/NAME[:CONFIG][/SPLIT] is a dataset on the hub.",
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
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="In folders, only files that match this pattern: '*.py'.", rich_help_panel=CORPUS
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="In folders, skip files that match this pattern.", rich_help_panel=CORPUS
        ),
    ] = None,
    input: Annotated[
        Literal["auto", "text", "json", "jsonl", "csv", "tsv", "parquet", "arrow", "wet"],
        typer.Option(
            help="Format of all files; auto decides by the first bytes, then by name.",
            rich_help_panel=CORPUS,
        ),
    ] = "auto",
    text_key: Annotated[
        str,
        typer.Option(
            help="Key or column of the text in JSON and tables; a.b is b in an object a.",
            rich_help_panel=CORPUS,
        ),
    ] = "text",
    document_separator: Annotated[
        str | None,
        typer.Option(
            help="Line that separates documents in plain text files.",
            show_default="a file is a document",
            rich_help_panel=CORPUS,
        ),
    ] = None,
    errors: Annotated[
        Literal["skip", "replace", "fail"] | None,
        typer.Option(
            help="Documents that are not UTF-8: skip them, replace invalid bytes, or stop. Nulls, "
            "files that are not text and the rest of a damaged file: skip or stop.",
            show_default="skip, but stop at a damaged file",
            rich_help_panel=CORPUS,
        ),
    ] = None,
    dedup: Annotated[
        bool,
        typer.Option(
            "--dedup", help="Drop exact duplicates of earlier documents.", rich_help_panel=SPLITS
        ),
    ] = False,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share of the documents held out for validation.",
            show_default="0.01",
            rich_help_panel=SPLITS,
        ),
    ] = None,
    allow_special: Annotated[
        bool,
        typer.Option(
            "--allow-special",
            help="Encode special tokens in the text as such, not as plain text.",
            rich_help_panel=SPLITS,
        ),
    ] = False,
    bos: Annotated[
        str | None,
        typer.Option(
            help="Token before each document, or 'none'.",
            show_default="the tokenizer's own",
            rich_help_panel=SPLITS,
        ),
    ] = None,
    eos: Annotated[
        str | None,
        typer.Option(
            help="Token after each document.",
            show_default="the tokenizer's own",
            rich_help_panel=SPLITS,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Dataset folder.", show_default="data/NAME OF THE CORPUS", rich_help_panel=OUTPUT
        ),
    ] = None,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Add files that the dataset does not have yet.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Tokenize again and replace the dataset.", rich_help_panel=OUTPUT
        ),
    ] = False,
    format: Annotated[
        Literal["pretrain", "llm.c"],
        typer.Option(help="llm.c: also write shards for llm.c, to llm.c/.", rich_help_panel=OUTPUT),
    ] = "pretrain",
    shard_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens in a shard.", show_default="134217728", rich_help_panel=OUTPUT),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Number of encoding processes; does not change the dataset.",
            show_default="all cores",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    encoder: Annotated[
        Literal["auto", "gigatoken", "tokenizers"],
        typer.Option(
            help="Package that encodes; does not change the dataset. auto takes gigatoken, which "
            "is many times faster, where it is installed and gives the same ids.",
            rich_help_panel=OUTPUT,
        ),
    ] = "auto",
    part: Annotated[
        str | None,
        typer.Option(
            help="k/n: tokenize the k-th of n parts of the files, to OUT/part-k-of-n.",
            show_default="all files",
            rich_help_panel=MACHINES,
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Make one dataset of the parts given as paths, OUT/part-*, by hard links.",
            rich_help_panel=MACHINES,
        ),
    ] = False,
) -> None:
    """Turn text into a dataset to train on.

    A document is a file, a record of JSON, CSV, Parquet, Arrow or WARC text, or the text between
    two separator lines. Files may be compressed: .gz, .zst, .xz, .bz2. If the command is killed,
    run it again: it continues where it stopped. Without paths, it makes a small demo dataset from
    the Python standard library's sources.
    """
    if merge:
        _merge(ctx, paths or [], out, force=force)
        return
    from pretrain_cli.data.corpus.documents import ReadOptions
    from pretrain_cli.data.tokenizing.choose_tokenizer import BPE_VOCAB_SIZE
    from pretrain_cli.data.tokenizing.parts import parse_part
    from pretrain_cli.data.tokenizing.request import TokenizeRequest, default_folder
    from pretrain_cli.data.tokenizing.tokenize import demo_request
    from pretrain_cli.data.tokenizing.tokenize import tokenize as run
    from pretrain_cli.engine.runtime.host_memory import give_back_memory

    if paths:
        request = TokenizeRequest(
            paths=tuple(paths), out=default_folder(paths[0]), tokenizer="gemma3"
        )
    else:
        request = demo_request()
    given = {
        "out": out,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "val_fraction": val_fraction,
        "include": tuple(include) if include else None,
        "exclude": tuple(exclude) if exclude else None,
        "bos": bos,
        "eos": eos,
        "shard_tokens": shard_tokens,
        "workers": workers,
        "part": None if part is None else parse_part(part),
    }
    if tokenizer is not None and vocab_size is None:
        request = replace(request, vocab_size=None)
    request = replace(
        request,
        reading=ReadOptions(text_key, document_separator, errors, input),
        dedup=dedup,
        allow_special=allow_special,
        append=append,
        force=force,
        format=format,
        encoder=encoder,
        **{name: value for name, value in given.items() if value is not None},
    )
    with TokenizeProgress() as progress:
        give_back_memory()
        result = run(request, progress)

    manifest = result.manifest
    folder = escape(str(result.folder))
    if result.was_there:
        console.print(
            f"{folder} is up to date: the corpus and the options are unchanged. "
            "Tokenize again with --force.",
            soft_wrap=True,
        )
    if result.resumed:
        notice("Continued what an earlier run had finished")
    for path, why in list(result.left_out.items())[:5]:
        notice(f"Left out {path}: {why}")
    if len(result.left_out) > 5:
        notice(f"Left out {len(result.left_out) - 5} more such files")
    for remark, count in manifest.remarks.items():
        names = result.remarked.get(remark, [])
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        notice(f"{count:,} × {remark}" + (f": {shown}" if shown else ""))
    asked = request.vocab_size or BPE_VOCAB_SIZE
    if request.tokenizer == "bpe" and manifest.vocab_size < asked:
        notice(
            f"A vocabulary of {manifest.vocab_size:,} tokens, not {asked:,}: the text has nothing "
            "more to merge"
        )
    if manifest.duplicates:
        notice(f"{manifest.duplicates:,} duplicate documents are left out")
    if manifest.inexact_cuts:
        notice(
            f"{manifest.inexact_cuts:,} cuts in long documents may have changed the tokens beside "
            "them: no place was found where they don't"
        )
    if encoding := result.encoding:
        rate = (
            f"Encoded with {encoding.encoder}: {size(encoding.bytes_per_second)} of text a second"
        )
        if encoding.samples_compared:
            rate += f", {encoding.samples_compared:,} samples the same as by tokenizers"
        notice(rate)
        if encoding.why_not_gigatoken:
            notice(f"Not with gigatoken: {encoding.why_not_gigatoken}")
    _show(folder, manifest)
    if part is not None:
        merged = escape(str(request.out / "part-*"))
        console.print(
            f"When all parts are there: pretrain tokenize --merge {merged}", soft_wrap=True
        )
    elif not result.was_there:
        console.print(f"Train on it: pretrain train --data {folder}", soft_wrap=True)


def _show(folder: str, manifest: "Manifest") -> None:
    """Print what a dataset holds."""
    total, held_out = manifest.total, manifest.splits["val"].tokens
    # Count by source: a document cut between the splits is counted in both splits.
    documents = sum(part.documents for part in manifest.sources.values())
    console.print(
        f"[bold]{folder}[/]: {total.tokens:,} tokens of {escape(manifest.tokenizer)} "
        f"({held_out:,} for validation) from {documents:,} documents, "
        f"{size(total.bytes)} of text, {total.bytes / total.tokens:.2f} bytes a token",
        soft_wrap=True,
    )


def _merge(ctx: typer.Context, parts: list[str], out: Path | None, *, force: bool) -> None:
    """Merge the parts of a dataset, and show the result."""
    from pretrain_cli.data.tokenizing.merge import merge

    for name in ctx.params:
        if name not in TAKEN_BY_MERGE and str(ctx.get_parameter_source(name)).endswith(
            "COMMANDLINE"
        ):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"--merge: takes no {option}; the parts say how they were made")
    result = merge(list(map(Path, parts)), out, force=force)
    folder = escape(str(result.folder))
    if result.was_there:
        console.print(f"{folder} is up to date: these parts are merged.", soft_wrap=True)
    _show(folder, result.manifest)
    if not result.was_there:
        console.print(f"Train on it: pretrain train --data {folder}", soft_wrap=True)
    notice("The parts may be removed: where the file system has hard links, they take no space")
