"""`pretrain inspect`: the contents of a tokenized dataset, and any damage."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from pretrain_cli.commands.display import check_output, console, remark
from pretrain_cli.units import amount, size

SOURCES_SHOWN = 20
BARS = "▁▂▃▄▅▆▇█"


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
    read_all: Annotated[
        bool, typer.Option("--all", help="Check all documents instead of a sample.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw lengths and sources as a .png or .svg.", show_default="none"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what a dataset holds: its tokenizer, documents, sources; a sample; any damage.

    Every file's presence and size are checked; --verify reads them all. A sample of the documents
    is checked for what usually goes wrong: copies, joined documents, repeated lines.
    """
    from pretrain_cli.data.dataset import find_damage
    from pretrain_cli.data.shards import read_manifest
    from pretrain_cli.errors import ConfigError

    if sample is None:
        sample_options = {"--seq-len": seq_len, "--packing": packing, "--seed": seed}
        for option, value in sample_options.items():
            if value is not None:
                raise ConfigError(f"{option}: {value} is of a sample; say which with --sample")
    if plot is not None:
        from pretrain_cli.engine.benchmark.render import need_matplotlib

        need_matplotlib(plot)
        check_output(plot, "--plot")
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
    facts = _facts(dataset, manifest, read_all=read_all)
    if plot is not None:
        from pretrain_cli.data.dataset_picture import draw

        draw(facts, plot)
    if verify:
        facts["verified"] = "every checksum"
    if as_json:
        typer.echo(json.dumps(facts | ({"sample": shown} if shown else {}), indent=2))
        return
    if shown is None:
        _print(facts)
        if plot is not None:
            console.print(f"Written to {escape(str(plot))}", soft_wrap=True)
    else:
        _print_sample(shown)


def _facts(folder: Path, manifest: Any, *, read_all: bool) -> dict[str, Any]:
    from dataclasses import asdict

    from pretrain_cli.data.checks import check_dataset
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
            name: asdict(document_lengths(open_split(folder, manifest, name), read_all=read_all))
            for name in manifest.splits
        },
        "sources": {
            name: part.model_dump()
            | {
                "share": part.tokens / total.tokens,
                "tokens_per_byte": part.tokens / max(part.bytes, 1),
            }
            for name, part in manifest.sources.items()
        },
        "duplicates": manifest.duplicates,
        "inexact_cuts": manifest.inexact_cuts,
        "remarks": manifest.remarks,
        "shards": len(manifest.shards),
        "checks": asdict(check_dataset(folder, manifest, read_all=read_all)),
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
            f"Tokens a training document: {lengths['shortest']:,} "
            f"{sparkline(lengths['by_power'])} {lengths['longest']:,}, by powers of two",
            soft_wrap=True,
        )
    sources = Table("source", box=None, pad_edge=False, header_style="bold")
    for heading in ("share", "tokens", "files", "documents", "text", "tokens/byte"):
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
            f"{part['tokens_per_byte']:.3f}",
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
    _print_checks(facts["checks"])


def _print_checks(checks: dict[str, Any]) -> None:
    total, copies = checks["documents"], checks["copies"]
    share = "an unknown share" if copies is None else f"{copies:.1%}"
    console.print(
        f"Checked, by seed {checks['seed']}, of {total:,} training documents: the lengths of "
        f"{checks['lengths_read']:,}, the tokens of {checks['compared']:,}, the text of "
        f"{checks['decoded']:,}; {share} are copies, {checks['not_utf8']:.1%} were "
        "not UTF-8",
        soft_wrap=True,
    )
    for warning in checks["warnings"]:
        console.print(f"[yellow]![/] {escape(warning)}", soft_wrap=True)


def sparkline(by_power: dict[int, int]) -> str:
    """Return a character for each power of two between the least and the largest, as high as its
    number of documents; a space for none."""
    powers = range(min(by_power).bit_length(), max(by_power).bit_length() + 1)
    counts = [by_power.get(2 ** (power - 1), 0) for power in powers]
    steps = len(BARS) - 1
    return "".join(BARS[round(steps * n / max(counts))] if n else " " for n in counts)


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
