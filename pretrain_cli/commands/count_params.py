"""`pretrain count-params`: a model's parameters, FLOPs and memory, computed without building it."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pretrain_cli.commands.count_params_plan import Asked, show_plan
from pretrain_cli.commands.display import console, size

PLAN = "With --plan"
PARTS = ("embeddings", "attention", "mlp", "norms", "head")


def count_params(
    model: Annotated[str, typer.Option(help="Model name or YAML file.")] = "gemma3",
    tied: Annotated[
        bool | None,
        typer.Option(
            "--tied/--untied",
            help="Head and embedding share one matrix, or have two.",
            show_default="both, side by side",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Vocabulary size instead of the model's.", show_default="the model's"),
    ] = None,
    seq_len: Annotated[
        int, typer.Option(help="Sequence length for FLOPs and the key/value cache.")
    ] = 1024,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Estimate a run: memory by part, micro-batch that fits, time, disk.",
        ),
    ] = False,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Training tokens: 5B, 200M, …", show_default="20 a parameter", rich_help_panel=PLAN
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="A GPU by name (h200, h100, a100, …), or cpu, cuda or mps of this machine.",
            show_default="the one that is here",
            rich_help_panel=PLAN,
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="Number of GPUs: a copy of the model on each, and sharded.",
            show_default="1",
            rich_help_panel=PLAN,
        ),
    ] = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples at once.", show_default="the most that fit", rich_help_panel=PLAN
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float8.", show_default="by the device", rich_help_panel=PLAN
        ),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="torch.compile.",
            show_default="on a GPU",
            rich_help_panel=PLAN,
        ),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            help="MFU to assume, under the exact mask.",
            show_default="0.4",
            rich_help_panel=PLAN,
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Time real steps on this machine.",
            rich_help_panel=PLAN,
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Count parameters by part, training FLOPs and memory.

    Everything is computed from the model's configuration; no memory is allocated. Only --calibrate
    runs training steps.
    """
    from pretrain_cli.config.run_config import ModelSettings
    from pretrain_cli.config.yaml_files import find_model
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
    asked = Asked(tokens, device, gpus, micro_batch_size, dtype, compile_, mfu, calibrate)
    if plan:
        if tied is not None:
            config = variant(config, {"tie_word_embeddings": tied})
        show_plan(name, config, seq_len, asked, as_json=as_json)
        return
    asked.refuse_alone()
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
