"""`pretrain inspect`: the contents of a tokenized dataset, and any damage."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from pretrain_cli.commands.display import console, remark
from pretrain_cli.units import amount, size

SOURCES_SHOWN = 20
BAR = 30


def inspect(
    dataset: Annotated[Path, typer.Argument(help="A dataset's folder.")],
    sample: Annotated[
        int | None, typer.Option(help="Show the training sample of this number, from 0.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Of the sample.", show_default="512")] = None,
    packing: Annotated[
        Literal["concat", "best-fit"] | None,
        typer.Option(help="Sequence length of the run.", show_default="concat"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.", show_default="0")] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Recompute every checksum; exit with 1 if one differs."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what a dataset holds: its tokenizer, documents, sources; a sample; any damage.

    Every file's presence and size are checked; --verify reads them all.
    """
    from pretrain_cli.data.dataset import find_damage
    from pretrain_cli.data.shards import read_manifest
    from pretrain_cli.errors import ConfigError

    if sample is None:
        sample_options = {"--seq-len": seq_len, "--packing": packing, "--seed": seed}
        for option, value in sample_options.items():
            if value is not None:
                raise ConfigError(f"{option}: {value} is of a sample; say which with --sample")
    manifest = read_manifest(dataset)
    damages = list(find_damage(dataset, manifest, thoroughly=verify))
    if damages:
        if as_json:
            typer.echo(json.dumps({"dataset": str(dataset), "damage": damages}, indent=2))
        else:
            for damage in damages:
                console.print(f"[red]{escape(damage)}[/]", soft_wrap=True)
        raise typer.Exit(1)
    shown = None
    if sample is not None:
        seq_len = 512 if seq_len is None else seq_len
        shown = _sample(dataset, sample, seq_len, packing or "concat", seed or 0)
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
    from pretrain_cli.data.inspection import document_lengths, marks

    total = manifest.total
    beginning, end = marks(folder, manifest)
    return {
        "dataset": str(folder),
        "fingerprint": manifest.fingerprint,
        "tokenizer": manifest.tokenizer,
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "beginning_of_document": manifest.beginning_of_document,
        "beginning_token": beginning,
        "end_of_document": manifest.end_of_document,
        "end_token": end,
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


def _sample(folder: Path, number: int, seq_len: int, packing: str, seed: int) -> dict[str, Any]:
    """Return training sample `number` of a run on this dataset alone, split into documents."""
    import numpy as np

    from pretrain_cli.data.batches import order_of
    from pretrain_cli.data.dataset import open_dataset
    from pretrain_cli.data.inspection import documents_in
    from pretrain_cli.data.opening import open_samples
    from pretrain_cli.errors import ConfigError

    opened = open_dataset(folder)
    train = opened.train
    if not 0 <= number < 2**63:
        raise ConfigError(f"--sample: {number} is not from 0 up to 2⁶³")
    if not 1 <= seq_len < len(train.tokens):
        raise ConfigError(
            f"--seq-len: {seq_len} is not from 1 to {max(len(train.tokens) - 1, 1):,}"
        )
    samples = open_samples(opened, seq_len=seq_len, packing=packing, notify=remark)
    stretches = samples.stretches(int(order_of(samples, seed)(np.array([number]))[0]))
    tokens: list[int] = []
    documents: list[tuple[bool, str]] = []
    for first, count in stretches:
        starts = train.documents.between(first, first + count) - first
        part = train.tokens.read(first, count)
        tokens += part.tolist()
        documents += documents_in(part, starts, opened.tokenizer)
    return {
        "number": number,
        "epoch": number // len(samples),
        "samples_an_epoch": len(samples),
        "stretches": [{"first_token": first, "tokens": count} for first, count in stretches],
        "padding": seq_len + 1 - len(tokens),
        "tokens": tokens,
        "documents": [{"begins": begins, "text": text} for begins, text in documents],
    }


def _print(facts: dict[str, Any]) -> None:
    marks = [
        f"{facts[token]} ({facts[number]})"
        for number, token in (
            ("beginning_of_document", "beginning_token"),
            ("end_of_document", "end_token"),
        )
        if facts[number] is not None
    ]
    console.print(
        f"[bold]{escape(facts['dataset'])}[/]: {escape(facts['tokenizer'])}, "
        f"{facts['vocab_size']:,} ids as {facts['dtype']}, "
        f"documents {'between' if len(marks) == 2 else 'end with'} {escape(' and '.join(marks))}, "
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
    for reason, count in facts["remarks"].items():
        console.print(f"{count:,} × {reason}")
    if facts["duplicates"]:
        console.print(f"{facts['duplicates']:,} duplicates left out")
    if facts["inexact_cuts"]:
        console.print(f"{facts['inexact_cuts']:,} inexact cuts in long documents")


def _print_sample(sample: dict[str, Any]) -> None:
    places = ", ".join(f"{part['first_token']:,}" for part in sample["stretches"])
    console.rule(f"sample {sample['number']:,}, epoch {sample['epoch']:,}: tokens from {places} on")
    for document in sample["documents"]:
        if document["begins"]:
            console.print("[dim]── a document begins ──[/]")
        else:
            console.print("[dim]── within a document ──[/]")
        console.print(document["text"], markup=False, soft_wrap=True)
    if sample["padding"]:
        console.print(f"[dim]── {sample['padding']:,} places of padding ──[/]")
    console.rule()
