"""`pretrain count-params`: what a model is, before it is built."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pretrain_cli.commands.display import console, size

PARTS = ("embeddings", "attention", "mlp", "norms", "head")


def count_params(
    model: Annotated[str, typer.Option(help="A name or a YAML file.")] = "gemma3",
    tied: Annotated[
        bool | None,
        typer.Option(
            "--tied/--untied",
            help="Head and embedding one matrix, or two.",
            show_default="both, side by side",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Another vocabulary.", show_default="the model's")
    ] = None,
    seq_len: Annotated[
        int, typer.Option(help="For the FLOPs, and what sampling remembers.")
    ] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Count parameters by part, training FLOPs and memory.

    From the architecture's numbers alone: nothing is allocated.
    """
    from pretrain_cli.config import ModelSettings, find_model
    from pretrain_cli.errors import ConfigError
    from pretrain_cli.model.config import variant

    settings: dict[str, Any] = {"name": model}
    if vocab_size is not None:
        settings["vocab_size"] = vocab_size
        if vocab_size < 1:
            raise ConfigError(f"--vocab-size: {vocab_size} is not above zero")
    name, config = find_model(ModelSettings(**settings))
    if not 1 <= seq_len <= config.max_position_embeddings:
        raise ConfigError(
            f"--seq-len: {seq_len:,} is not from 1 to the model's "
            f"{config.max_position_embeddings:,} positions"
        )
    choices = [True, False] if tied is None else [tied]
    columns = {
        ("tied" if choice else "untied"): variant(config, {"tie_word_embeddings": choice})
        for choice in choices
    }
    if as_json:
        counts = {word: _as_json(variant_, seq_len) for word, variant_ in columns.items()}
        head = {"model": name, "published_as": _as_published(config), "seq_len": seq_len}
        typer.echo(json.dumps(head | counts, indent=2))
        return
    console.print(_table(name, config, columns, seq_len))


def _as_published(config: Any) -> str:
    return "tied" if config.tie_word_embeddings else "untied"


def _as_json(config: Any, seq_len: int) -> dict[str, Any]:
    from pretrain_cli.model.counting import (
        cache_bytes,
        checkpoint_bytes,
        count_parameters,
        state_bytes,
        training_flops,
    )

    count = count_parameters(config)
    return {
        "parameters": {part: getattr(count, part) for part in PARTS}
        | {"total": count.total, "active": count.active},
        "training_flops_per_token": asdict(training_flops(config, seq_len)),
        "training_state_bytes": state_bytes(config),
        "checkpoint_bytes": checkpoint_bytes(config),
        "sampling_bytes": {
            "weights": 2 * count.total,
            "cache_per_text": cache_bytes(config, seq_len, 2),
        },
    }


def _table(name: str, config: Any, columns: dict[str, Any], seq_len: int) -> Table:
    depth, sliding = config.num_hidden_layers, config.layer_types.count("sliding_attention")
    layers = f"{depth} layers" + (
        f" ({sliding} sliding over {config.sliding_window}, {depth - sliding} full)"
        if sliding
        else ""
    )
    table = Table(
        title=f"[bold]{escape(name)}[/]  {layers}, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads / {config.num_key_value_heads} kv of "
        f"{config.head_dim}, vocabulary {config.vocab_size:,}",
        title_justify="left",
    )
    table.add_column("parameters")
    for word in columns:
        mark = " (the model's own)" if word == _as_published(config) else ""
        table.add_column(word + mark, justify="right")
    rows = [_as_json(variant_, seq_len) for variant_ in columns.values()]
    for part in PARTS:
        table.add_row(part, *[_cell(row["parameters"][part]) for row in rows])
    table.add_section()
    table.add_row("[bold]total", *[f"[bold]{row['parameters']['total']:,}" for row in rows])
    if config.num_experts:
        table.add_row("active a token", *[f"{row['parameters']['active']:,}" for row in rows])
    table.add_section()
    for label, key in (("exact mask", "exact"), ("full attention", "conventional")):
        cells = [f"{row['training_flops_per_token'][key] / 1e9:.4g} GFLOP" for row in rows]
        table.add_row(f"training a token at {seq_len:,}, {label}", *cells)
    table.add_row(
        "weights, gradients and AdamW in float32",
        *[size(row["training_state_bytes"]) for row in rows],
    )
    table.add_row(
        "a checkpoint, and its copy in the host's memory",
        *[size(row["checkpoint_bytes"]) for row in rows],
    )
    for label, key in (
        ("sampling in bfloat16: weights", "weights"),
        (f"sampling in bfloat16: keys and values of {seq_len:,} tokens", "cache_per_text"),
    ):
        table.add_row(label, *[size(row["sampling_bytes"][key]) for row in rows])
    return table


def _cell(count: int) -> str:
    return f"{count:,}" if count else "—"
