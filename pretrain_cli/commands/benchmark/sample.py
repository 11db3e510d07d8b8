"""`pretrain benchmark sample`: the speed of prefill and decoding."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pretrain_cli.commands.display import check_output, console, notice, write_json
from pretrain_cli.commands.options import OfProcess
from pretrain_cli.units import duration
from pretrain_cli.units import size as in_bytes

PROMPT, TOKENS, ROUNDS = 512, 256, 3


def benchmark_sample(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model name or YAML file.", show_default="gemma3-tiny on a CPU, gemma3-270m else"
        ),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a prompt.", show_default=str(PROMPT))
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens generated after it.")] = TOKENS,
    batch_size: Annotated[int, typer.Option(help="Texts generated at a time.")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds: how often each arm is measured.")] = ROUNDS,
    vs: Annotated[
        str | None,
        typer.Option(
            metavar="PROGRAM",
            help="Compare with transformers, or with a process setting speed.NAME=VALUE. "
            "Several with commas.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto.")] = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(metavar="int8", help="Use int8 matrices in our arms.", show_default="no"),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="torch.compile.", show_default="as pretrain sample has"
        ),
    ] = None,
    set_: OfProcess = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file.")
    ] = None,
) -> None:
    """Time prefill and greedy decoding of random tokens with random weights."""
    from pretrain_cli.config.build import build_config
    from pretrain_cli.config.run_config import ModelSettings
    from pretrain_cli.config.yaml_files import find_model
    from pretrain_cli.engine.runtime.process_settings import check_process_settings
    from pretrain_cli.errors import ConfigError

    check_output(as_json)
    check_process_settings("--set", set_ or ())
    prompt = PROMPT if seq_len is None else seq_len
    for name, value, least in (
        ("max-tokens", max_tokens, 2),
        ("seq-len", prompt, 1),
        ("batch-size", batch_size, 1),
        ("rounds", rounds, 1),
    ):
        if value < least:
            raise ConfigError(f"--{name}: {value} is not at least {least}")
    asked = build_config({}, {"speed.dtype": dtype}, set_ or ()).speed

    from pretrain_cli.engine.benchmark.sample import measure
    from pretrain_cli.engine.benchmark.sample_arm import Workload
    from pretrain_cli.engine.runtime.distributed import device_name, find_device
    from pretrain_cli.engine.runtime.speed import resolve_speed

    place = find_device(device)
    name, config = find_model(
        ModelSettings(name=model or ("gemma3-tiny" if place.type == "cpu" else "gemma3-270m"))
    )
    if prompt + max_tokens > config.max_position_embeddings:
        raise ConfigError(
            f"--seq-len: {prompt:,} and --max-tokens {max_tokens:,} are beyond the model's "
            f"{config.max_position_embeddings:,} positions"
        )
    speed = resolve_speed(asked, place, training=False)
    workload = Workload(
        model=config,
        prompt=prompt,
        tokens=max_tokens,
        batch=batch_size,
        rounds=rounds,
        device=str(place),
        dtype=str(speed.dtype),
        compiled=compile_,
        quantize=quantize,
        settings=tuple(set_ or ()),
        vs=tuple(name.strip() for name in vs.split(",")) if vs else (),
    )
    int8 = f", matrices in {quantize}" if quantize else ""
    with console.status("starting") as status:
        measured = measure(workload, status.update)
    console.print(
        f"[bold]{escape(name)}[/] {batch_size} × {prompt} tokens, then {max_tokens} generated, "
        f"{speed.dtype}{int8}, {device_name(place)}\n"
        f"A step reads {in_bytes(measured.step_bytes)}; memory copies "
        f"{in_bytes(measured.copy_rate)}/s, which is {measured.limit:.1f} tokens/s",
        soft_wrap=True,
    )
    for result in measured.results:
        for said in result.said:
            notice(f"{result.arm}: {said}")
    console.print(_table(measured.results))
    if as_json is not None:
        write_json(as_json, {"workload": {"name": name, **asdict(workload)}, **asdict(measured)})


def _table(results: list[Any]) -> Table:
    table = Table()
    table.add_column("")
    for heading in ("prefill tok/s", "decode tok/s", "of the limit", "from – to", "ratio",
                    "load", "compile"):  # fmt: skip
        table.add_column(heading, justify="right")
    for result in results:
        rates = [rate for _, rate in result.rounds]
        table.add_row(
            result.arm,
            f"{result.prefill_tokens_per_second:,.0f}",
            f"{result.decode_tokens_per_second:,.1f}",
            f"{result.share_of_limit:.0%}",
            f"{min(rates):,.1f} – {max(rates):,.1f}",
            "" if result.ratio is None else f"{result.ratio:.2f}",
            duration(result.load_seconds),
            duration(result.compile_seconds),
        )
    return table
