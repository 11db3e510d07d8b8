"""`pretrain benchmark`: what a training step costs here, backend by backend; or how fast batches
are read, or text is tokenized."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pretrain_cli.amounts import duration
from pretrain_cli.commands.benchmark_data import benchmark_data
from pretrain_cli.commands.benchmark_tokenize import benchmark_tokenize
from pretrain_cli.commands.display import console, notice, write_json
from pretrain_cli.commands.display import size as in_bytes

OPTIONS = {
    "step": {
        "attn", "model", "seq_len", "micro_batch_size", "steps", "warmup", "device", "dtype",
        "compile_", "set_", "as_json",
    },
    "data": {
        "data", "tokenizer", "size", "packing", "seq_len", "micro_batch_size", "as_json",
    },
    "tokenize": {"tokenizer", "text", "rounds", "workers", "as_json"},
}  # fmt: skip
"""What can be measured, and the options that say something about it."""
DATA, TOKENIZE = "Of data", "Of tokenize"
CPU_STEP_FLOPS = 1e12
PEAK_SECONDS = 1.0
NOT_SET = ("speed.attention=", "model.name=", "model.init_from=", "speed.prefetch=")
"""--attn and --model say the first two; weights cost what random ones do; no batch is read."""


def benchmark(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            help="step: the real training step on synthetic tokens. data: reading batches. "
            "tokenize: text to tokens."
        ),
    ] = "step",
    attn: Annotated[
        str, typer.Option(help="eager, sdpa, flex, blocks, several with commas, or all.")
    ] = "all",
    model: Annotated[
        str | None,
        typer.Option(
            help="A name or a YAML file.", show_default="gemma3-tiny on a CPU, gemma3-270m else"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Read this dataset.", show_default="made, of --size", rich_help_panel=DATA
        ),
    ] = None,
    size: Annotated[
        float | None, typer.Option(help="GB to make.", show_default="2", rich_help_panel=DATA)
    ] = None,
    packing: Annotated[
        str | None,
        typer.Option(help="concat or best-fit.", show_default="concat", rich_help_panel=DATA),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokenize these files. Repeatable.",
            show_default="Python's own sources",
            rich_help_panel=TOKENIZE,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="One, or several with commas. With data: what made its .bin files.",
            show_default="the published ones",
            rich_help_panel=TOKENIZE,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that tokenize.",
            show_default="as pretrain tokenize has",
            rich_help_panel=TOKENIZE,
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Times each is tokenized.", rich_help_panel=TOKENIZE)
    ] = 3,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens a sample.", show_default="512 for steps on a CPU, 1024 else"),
    ] = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(help="Samples a step, or a batch.", show_default="by the device; 8 with data"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps that count.")] = 5,
    warmup: Annotated[int, typer.Option(help="Steps before, timed apart.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto.")] = "auto",
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile.", show_default="on a GPU"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SPEED.NAME=VALUE", help="A speed setting, or model.NAME."),
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file.")
    ] = None,
) -> None:
    """Time the real training step on synthetic tokens, the reading of batches, or tokenizing.

    Each backend runs in a fresh process, warm-up and compiling apart. One that can't train on this
    device is timed forward only, and says so. `pretrain benchmark data` reads a dataset, or one
    that it makes and takes away again, from a warm page cache; `pretrain benchmark tokenize` takes
    turns with the tokenizers library.
    """
    from pretrain_cli.config import build_config, find_model
    from pretrain_cli.errors import ConfigError

    _check_options(context, what)
    _check_output(as_json)
    if what == "data":
        return benchmark_data(data, tokenizer, size, packing, seq_len, micro_batch_size, as_json)
    if what == "tokenize":
        return benchmark_tokenize(tokenizer, text, rounds, workers, as_json)

    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ConfigError(f"--{name}: {value} is not at least {least}")
    flags = {"speed.dtype": dtype, "speed.compile": compile_, "model.name": model}
    flags |= {"train.micro_batch_size": micro_batch_size, "data.seq_len": seq_len}
    for assignment in set_ or []:
        if not assignment.startswith(("speed.", "model.")) or assignment.startswith(NOT_SET):
            raise ConfigError(
                f"--set {assignment}: not a setting of a benchmark; it takes speed.NAME=VALUE and "
                "model.NAME=VALUE, and options for the rest: --attn, --seq-len, …"
            )
    settings = build_config({}, flags, set_ or [])

    from pretrain_cli.engine.process import wait_passively

    wait_passively(settings.speed.passive_threads)
    import torch

    from pretrain_cli.engine import benchmark as engine
    from pretrain_cli.engine.distributed import find_device
    from pretrain_cli.engine.peak import find_peak
    from pretrain_cli.engine.run import device_name
    from pretrain_cli.engine.speed import apply_process_settings, resolve_speed
    from pretrain_cli.model.counting import count_parameters, training_flops

    backends = engine.parse_backends(attn)
    place = find_device(device)
    on_cpu = place.type == "cpu"
    if model is None:
        chosen = {"name": "gemma3-tiny" if on_cpu else "gemma3-270m"}
        settings = settings.model_copy(update={"model": settings.model.model_copy(update=chosen)})
    name, config = find_model(settings.model)
    if seq_len is None:
        seq_len = min(512 if on_cpu else 1024, config.max_position_embeddings)
    elif seq_len > config.max_position_embeddings:
        raise ConfigError(
            f"--seq-len: {seq_len:,} is beyond the model's {config.max_position_embeddings:,} "
            "positions"
        )
    if micro_batch_size is None:
        affordable = CPU_STEP_FLOPS / (training_flops(config, seq_len).exact * seq_len)
        micro_batch_size = max(1, min(4, int(affordable))) if on_cpu else 16
    workload = engine.Workload(
        model=config,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        steps=steps,
        warmup=warmup,
        device=str(place),
    )
    asked = settings.speed
    resolved = resolve_speed(asked, place, training=False)
    apply_process_settings(resolved)
    peak = find_peak(place, resolved.compute_dtype, seconds=PEAK_SECONDS)
    source = peak.source
    if peak.measured != peak.flops:
        source += f"; {peak.measured / 1e12:.3g} measured"
    console.print(
        f"[bold]{escape(name)}[/] {count_parameters(config).total:,} parameters, "
        f"{micro_batch_size} × {seq_len} tokens a step, {resolved.dtype}, {device_name(place)}, "
        f"torch {torch.__version__}\nPeak {peak.flops / 1e12:.3g} TFLOP/s ({source})",
        soft_wrap=True,
    )
    results = []
    for backend in backends:
        with console.status(f"{backend}: {warmup} + {steps} steps"):
            results += engine.run_arms(workload, asked, [backend], peak)
    console.print(_table(results))
    for result in results:
        if result.reason:
            notice(f"{result.attention}: {result.reason}; its forward pass alone was timed")
    if as_json is not None:
        write_json(
            as_json,
            {
                "machine": device_name(place),
                "torch": str(torch.__version__),
                "peak": asdict(peak),
                "workload": {"name": name, **asdict(workload)},
                "results": [asdict(result) for result in results],
            },
        )


def _check_options(context: typer.Context, what: str) -> None:
    """Refuse what can't be measured, and options that say nothing about what is."""
    from pretrain_cli.errors import ConfigError, did_you_mean

    if what not in OPTIONS:
        raise ConfigError(
            f"benchmark: '{what}' is not one of {', '.join(OPTIONS)}{did_you_mean(what, OPTIONS)}"
        )
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        typed = source is not None and source.name == "COMMANDLINE"
        if typed and name not in {"what", *OPTIONS[what]}:
            others = " and ".join(other for other in OPTIONS if name in OPTIONS[other])
            raise ConfigError(
                f"{parameter.opts[0]}: an option of pretrain benchmark {others}, not of {what}; "
                "leave it out"
            )


def _check_output(path: Path | None) -> None:
    from pretrain_cli.errors import ConfigError

    if path is not None and path.is_dir():
        raise ConfigError(f"--json: {path} is a folder; give a file")
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"--json: no folder {path.parent} to write {path.name} in")


def _table(results: list[Any]) -> Table:
    table = Table()
    table.add_column("attention")
    table.add_column("timed")
    for heading in ("median", "from – to", "tokens/s", "MFU", "memory", "warm-up"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.attention,
            result.kind,
            f"{result.step_median * 1e3:,.0f} ms",
            f"{result.step_fastest * 1e3:,.0f} – {result.step_slowest * 1e3:,.0f}",
            f"{result.tokens_per_second:,.0f}",
            f"{result.mfu:.1%}",
            in_bytes(result.peak_memory),
            duration(result.warmup),
        )
    return table
