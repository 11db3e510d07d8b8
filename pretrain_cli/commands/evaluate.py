"""`pretrain evaluate`: the validation loss of a checkpoint on any dataset of its tokenizer."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pretrain_cli.commands.display import console, notice, remark
from pretrain_cli.commands.evaluate_tasks import show_tasks
from pretrain_cli.commands.options import OfProcess, settle_process

TASKS = "Tasks"


def evaluate(
    where: Annotated[
        Path | None,
        typer.Argument(
            help="A run, a checkpoint or a Hugging Face model folder.",
            show_default="the newest run",
        ),
    ] = None,
    best: Annotated[
        bool,
        typer.Option("--best", help="Use the run's checkpoint with the lowest validation loss."),
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATASET",
            help="A tokenized dataset, or .bin files, as for pretrain train. Repeatable.",
            show_default="the run's",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of .bin files, as for pretrain tokenize.")
    ] = None,
    eval_tokens: Annotated[
        int | None,
        typer.Option(
            help="Evaluate only this many tokens of each split.", show_default="the run's, or all"
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens per window; with --tasks, the longest text.",
            show_default="the run's; else 512 on a CPU, 1024; with --tasks, the model's",
        ),
    ] = None,
    document_mask: Annotated[
        bool | None,
        typer.Option(
            "--document-mask/--no-document-mask",
            help="Stop attention at document boundaries.",
            show_default="the run's",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = "auto",
    attn: Annotated[
        str | None,
        typer.Option(
            help="Attention: eager, sdpa, blocks, flex, varlen.", show_default="the run's"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Compute in float32 or bfloat16.", show_default="the run's"),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile.", show_default="no"),
    ] = None,
    set_: OfProcess = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="int8",
            help="Also evaluate int8 weights, as in pretrain sample.",
            show_default="no",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Tasks of lm-evaluation-harness, or its YAML files, instead of the loss.",
            rich_help_panel=TASKS,
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="Folder of your own tasks.", rich_help_panel=TASKS),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Evaluate only this many questions of each task.",
            show_default="all",
            rich_help_panel=TASKS,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Measure loss, perplexity and bits per byte on validation splits: every token once.

    The result equals training's validation: a checkpoint gets the loss that its run's metrics.jsonl
    records for its step. The dataset must come from the model's tokenizer.
    """
    loss_options = {"data": data, "tokenizer": tokenizer, "eval-tokens": eval_tokens,
               "document-mask": document_mask, "compile": compile_}  # fmt: skip
    settle_process(set_)
    _refuse_others(loss_options, {"include-path": include_path, "limit": limit}, tasks)
    if tasks is not None:
        show_tasks(
            as_json,
            where=where,
            best=best,
            tasks=tuple(name.strip() for name in tasks.split(",")),
            include_path=include_path,
            limit=limit,
            seq_len=seq_len,
            device=device,
            dtype=dtype,
            attention=attn,
            quantize=quantize,
            settings=tuple(set_ or ()),
        )
        return
    from pretrain_cli.engine.evaluation.evaluate_checkpoint import (
        EvaluateRequest,
        evaluate_checkpoint,
    )

    request = EvaluateRequest(
        where=where,
        best=best,
        data=tuple(data) if data else None,
        tokenizer=tokenizer,
        eval_tokens=eval_tokens,
        seq_len=seq_len,
        document_mask=document_mask,
        device=device,
        dtype=dtype,
        attention=attn,
        compile=compile_,
        quantize=quantize,
        settings=tuple(set_ or ()),
    )
    result = evaluate_checkpoint(request, remark if as_json else notice)
    if result is None:  # only the first rank has the result
        return
    facts = _facts(result)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    masked = ", documents masked" if result.document_mask else ""
    int8 = f", matrices in {result.quantize}" if result.quantize else ""
    console.print(
        f"[bold]{escape(str(result.folder))}[/] on {escape(result.data)}, windows of "
        f"{result.seq_len:,}{masked}, {result.attention}, {result.dtype}{int8}",
        soft_wrap=True,
    )
    console.print(_table(result.data, facts))
    if result.unquantized is not None:
        plain, loss = result.unquantized.loss, result.evaluation.loss
        console.print(f"Without quantization: {plain:.4f}; {loss - plain:+.5f} by int8")


def _refuse_others(
    loss_options: dict[str, Any], task_options: dict[str, Any], tasks: str | None
) -> None:
    """Raise ConfigError for an option that the chosen kind of evaluation would ignore."""
    from pretrain_cli.errors import ConfigError

    others, reason = task_options, "is of --tasks, which was not given; leave it out"
    if tasks is not None:
        others, reason = (
            loss_options,
            "is of the validation loss, and --tasks asks for tasks; choose one",
        )
    for name, value in others.items():
        if value is not None:
            raise ConfigError(f"--{name}: {reason}")


def _facts(result: Any) -> dict[str, Any]:
    whole = result.evaluation
    return {
        "checkpoint": str(result.folder),
        "data": result.data,
        "seq_len": result.seq_len,
        "document_mask": result.document_mask,
        "attention": result.attention,
        "dtype": result.dtype,
        "quantize": result.quantize,
        **_measures(whole),
        "sources": {name: _measures(source) for name, source in whole.sources.items()},
        "unquantized": _measures(result.unquantized) if result.unquantized else None,
    }


def _measures(part: Any) -> dict[str, Any]:
    names = ("loss", "perplexity", "bits_per_byte", "tokens", "split_tokens")
    return {name: getattr(part, name) for name in names}


def _table(data: str, facts: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("dataset")
    for heading in ("loss", "perplexity", "bits per byte", "tokens"):
        table.add_column(heading, justify="right")
    for name, part in facts["sources"].items():
        table.add_row(escape(name), *_cells(part))
    if facts["sources"]:
        table.add_section()
    table.add_row("all" if facts["sources"] else escape(data), *_cells(facts))
    return table


def _cells(part: dict[str, Any]) -> list[str]:
    of = f" of {part['split_tokens']:,}" if part["split_tokens"] > part["tokens"] else ""
    return [
        f"{part['loss']:.4f}",
        f"{part['perplexity']:,.4g}",
        f"{part['bits_per_byte']:.4f}",
        f"{part['tokens']:,}{of}",
    ]
