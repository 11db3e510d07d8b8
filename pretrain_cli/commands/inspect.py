"""`pretrain inspect`: what a tokenized dataset holds, and whether it is whole."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pretrain_cli.amounts import amount, size
from pretrain_cli.commands.display import console

SOURCES_SHOWN = 20
BAR = 30


def inspect(
    dataset: Annotated[Path, typer.Argument(help="A dataset's folder.")],
    sample: Annotated[
        int | None, typer.Option(help="Show the training sample of this number, from 0.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Of the sample.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the run whose order it is.")] = 0,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Recompute every checksum; exit 1 where one differs."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what a dataset holds: its tokenizer, documents, sources; a sample; any damage.

    Every file's presence and size are checked; --verify reads them all.
    """
    from pretrain_cli.data.dataset import find_damage
    from pretrain_cli.data.shards import read_manifest

    manifest = read_manifest(dataset)
    damages = list(find_damage(dataset, manifest, thoroughly=verify))
    if damages:
        if as_json:
            typer.echo(json.dumps({"dataset": str(dataset), "damage": damages}, indent=2))
        else:
            for damage in damages:
                console.print(f"[red]{escape(damage)}[/]", soft_wrap=True)
        raise typer.Exit(1)
    shown = _sample(dataset, sample, seq_len, seed) if sample is not None else None
    facts = _facts(dataset, manifest)
    if verify:
        facts["verified"] = "every checksum"
    if as_json:
        typer.echo(json.dumps(facts | ({"sample": shown} if shown else {}), indent=2))
        return
    if shown is None:
        _print(facts)
    else:
        _print_sample(shown)


def _facts(folder: Path, manifest: Any) -> dict[str, Any]:
    from dataclasses import asdict

    from pretrain_cli.data.dataset import open_split
    from pretrain_cli.data.inspection import document_lengths

    total = manifest.total
    return {
        "dataset": str(folder),
        "fingerprint": manifest.fingerprint,
        "tokenizer": manifest.tokenizer,
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "beginning_of_document": manifest.beginning_of_document,
        "end_of_document": manifest.end_of_document,
        "paths": manifest.paths,
        "options": manifest.options,
        "splits": {name: part.model_dump() for name, part in manifest.splits.items()},
        "bytes_per_token": total.bytes / total.tokens,
        "document_tokens": {
            name: asdict(document_lengths(open_split(folder, manifest, name)))
            for name in manifest.splits
        },
        "sources": {
            name: part.model_dump() | {"share": part.tokens / total.tokens}
            for name, part in manifest.sources.items()
        },
        "duplicates": manifest.duplicates,
        "inexact_cuts": manifest.inexact_cuts,
        "remarks": manifest.remarks,
        "shards": len(manifest.shards),
    }


def _sample(folder: Path, number: int, seq_len: int, seed: int) -> dict[str, Any]:
    """The training sample of this number in a run on this dataset alone, by documents."""
    import numpy as np

    from pretrain_cli.data.batches import Windows, order_of
    from pretrain_cli.data.dataset import open_dataset
    from pretrain_cli.data.inspection import documents_in
    from pretrain_cli.errors import ConfigError

    opened = open_dataset(folder)
    if number < 0:
        raise ConfigError(f"--sample: {number} is below 0")
    windows = Windows(
        opened.train.tokens,
        seq_len=seq_len,
        fingerprint=opened.fingerprint,
        separator=opened.separator,
    )
    if seq_len < 1 or not len(windows):
        raise ConfigError(
            f"--seq-len: {seq_len} is not from 1 to {max(len(opened.train.tokens) - 1, 1):,}"
        )
    window = int(order_of(windows, seed)(np.array([number]))[0])
    start = window * seq_len
    starts = opened.train.documents.between(start, start + seq_len + 1) - start
    tokens = opened.train.tokens.read(start, seq_len + 1)
    documents = documents_in(tokens, starts, opened.tokenizer)
    return {
        "number": number,
        "epoch": number // len(windows),
        "samples_an_epoch": len(windows),
        "first_token": start,
        "tokens": tokens.tolist(),
        "documents": [{"begins": begins, "text": text} for begins, text in documents],
    }


def _print(facts: dict[str, Any]) -> None:
    bos, eos = facts["beginning_of_document"], facts["end_of_document"]
    console.print(
        f"[bold]{escape(facts['dataset'])}[/]: {escape(facts['tokenizer'])}, "
        f"{facts['vocab_size']:,} ids as {facts['dtype']}, "
        f"documents {'between' if bos is not None else 'end with'} "
        f"{f'{bos} and ' if bos is not None else ''}{eos}, "
        f"{facts['bytes_per_token']:.2f} bytes a token",
        soft_wrap=True,
    )
    console.print(f"fingerprint {facts['fingerprint']}", soft_wrap=True)
    if "verified" in facts:
        console.print(f"[green]whole[/]: {facts['verified']} is right")
    splits = Table("split", box=None, pad_edge=False, header_style="bold")
    for heading in ("documents", "tokens", "text", "tokens a document"):
        splits.add_column(heading, justify="right")
    for name, part in facts["splits"].items():
        each = part["tokens"] / part["documents"] if part["documents"] else 0
        splits.add_row(
            name,
            f"{part['documents']:,}",
            f"{part['tokens']:,}",
            size(part["bytes"]),
            f"{each:,.0f}",
        )
    console.print(splits)
    lengths = facts["document_tokens"]["train"]
    if lengths["by_power"]:
        console.print(
            f"Tokens a training document, from {lengths['shortest']:,} to {lengths['longest']:,}:"
        )
        most = max(lengths["by_power"].values())
        for least, count in lengths["by_power"].items():
            bar = "█" * max(1, round(BAR * count / most))
            console.print(f"{least:>10,} –  {bar:<{BAR}} {count:,}")
    sources = Table("source", box=None, pad_edge=False, header_style="bold")
    for heading in ("share", "tokens", "files", "documents", "text"):
        sources.add_column(heading, justify="right")
    by_share = sorted(facts["sources"].items(), key=lambda item: -item[1]["tokens"])
    for name, part in by_share[:SOURCES_SHOWN]:
        sources.add_row(
            escape(name),
            f"{part['share']:.1%}",
            amount(part["tokens"]),
            f"{part['files']:,}",
            f"{part['documents']:,}",
            size(part["bytes"]),
        )
    console.print(sources)
    if len(by_share) > SOURCES_SHOWN:
        console.print(f"and {len(by_share) - SOURCES_SHOWN} more sources; --json has all")
    for remark, count in facts["remarks"].items():
        console.print(f"{count:,} × {remark}")
    if facts["duplicates"]:
        console.print(f"{facts['duplicates']:,} duplicates left out")
    if facts["inexact_cuts"]:
        console.print(f"{facts['inexact_cuts']:,} inexact cuts in long documents")


def _print_sample(sample: dict[str, Any]) -> None:
    console.rule(
        f"sample {sample['number']:,}, epoch {sample['epoch']:,}: tokens from "
        f"{sample['first_token']:,} on"
    )
    for number, document in enumerate(sample["documents"]):
        if document["begins"]:
            console.print("[dim]── a document begins ──[/]")
        elif number == 0:
            console.print("[dim]── within a document ──[/]")
        console.print(document["text"], markup=False, soft_wrap=True)
    console.rule()
