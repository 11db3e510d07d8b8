"""`pretrain benchmark`: the cost of a training step on this machine, setting by setting.
Subcommands time reading batches, tokenizing and sampling."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain_cli.commands.benchmark.data import benchmark_data
from pretrain_cli.commands.benchmark.find_micro_batch import search
from pretrain_cli.commands.benchmark.sample import benchmark_sample
from pretrain_cli.commands.benchmark.show import (
    OutputFiles,
    say_workload,
    show_comparison,
    show_profiles,
    watch,
)
from pretrain_cli.commands.benchmark.tokenize import benchmark_tokenize
from pretrain_cli.commands.display import check_folder, notice
from pretrain_cli.commands.options import Command, Group

NOT_SET = ("speed.attention=", "model.name=", "model.init_from=", "speed.prefetch=")
"""Keys refused in --set: --attn and --model set the first two, trained weights cost as much as
random ones, and no batch is read."""
MODES, OUTPUTS = "What is measured, beside one step", "What is written"

app = typer.Typer(cls=Group, invoke_without_command=True)
app.command("data", cls=Command)(benchmark_data)
app.command("tokenize", cls=Command)(benchmark_tokenize)
app.command("sample", cls=Command)(benchmark_sample)


@app.callback()
def benchmark(
    context: typer.Context,
    attn: Annotated[
        str | None,
        typer.Option(
            help="eager, sdpa, blocks, flex, varlen, several with commas, or all.",
            show_default="all; with one of the modes below, auto",
        ),
    ] = None,
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Ablation: all speed settings off, each alone on, all on, each alone off. A "
            "setting that you give (--no-compile, --dtype, --attn, --set speed.NAME) keeps its "
            "value in every arm and gets no arm of its own.",
            rich_help_panel=MODES,
        ),
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            help="Vary seq-len, window (none: all full), vocab, micro-batch or model. "
            "Repeatable, for every combination.",
            rich_help_panel=MODES,
        ),
    ] = None,
    vs: Annotated[
        str | None,
        typer.Option(
            metavar="PROGRAM",
            help="Compare with the same step by transformers.",
            rich_help_panel=MODES,
        ),
    ] = None,
    find_micro_batch: Annotated[
        bool,
        typer.Option(
            "--find-micro-batch",
            help="Find the largest micro-batch that fits, and the fastest, for train to use.",
            rich_help_panel=MODES,
        ),
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A.json B.json",
            help="Compare two result files; measures nothing.",
            rich_help_panel=MODES,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model name or YAML file.", show_default="gemma3-tiny on a CPU, gemma3-270m else"
        ),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a sample.", show_default="512 on a CPU, 1024 else")
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Samples a step.", show_default="by the device")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Rounds: how often each arm is measured.",
            show_default="3, and 1 of attention backends",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Counted steps of a round.")] = 5,
    warmup: Annotated[int, typer.Option(help="Warm-up steps of a round, not counted.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float8 or auto.", show_default="auto")
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="torch.compile.",
            show_default="on a GPU, and with --ablate and --vs",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SPEED.NAME=VALUE", help="Change a speed setting, or model.NAME."
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Profile a few steps: Chrome traces, top operators, parts of a step.",
            rich_help_panel=OUTPUTS,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Also draw the results, .png or .svg; needs matplotlib.", rich_help_panel=OUTPUTS
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Also write the tables as Markdown.", rich_help_panel=OUTPUTS),
    ] = None,
    as_json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Also write all results as JSON: every step's time, settings, machine, commit.",
            rich_help_panel=OUTPUTS,
        ),
    ] = None,
) -> None:
    """Time the real training step on synthetic tokens.

    Each arm runs in a fresh process, and arms take turns. Warm-up and compilation are timed
    separately. Ctrl-C or SIGTERM ends the benchmark early: the results so far are shown and
    written, marked as cut short. An arm whose results differ from the ones it must equal is
    reported. An attention backend that cannot train on this device is timed forward only.

    `data`: how fast batches are read. `tokenize`: how fast text becomes tokens. `sample`: how fast
    text is generated.
    """
    from pretrain_cli.engine.runtime.process_settings import silence_kineto
    from pretrain_cli.errors import ConfigError

    typed = _typed(context)
    if context.invoked_subcommand is not None:
        if typed:
            raise ConfigError(
                f"{typed[0]}: an option of pretrain benchmark alone; give what belongs to "
                f"{context.invoked_subcommand} behind it"
            )
        return
    modes = ("--ablate", "--sweep", "--vs", "--find-micro-batch", "--compare")
    asked_for = [name for name in modes if name in typed]
    if len(asked_for) > 1:
        raise ConfigError(f"{' and '.join(asked_for)}: one at a time")
    mode = asked_for[0] if asked_for else "--attn"
    if compare is not None:
        if others := [name for name in typed if name != "--compare"]:
            raise ConfigError(f"{others[0]}: --compare measures nothing; leave it out")
        return show_comparison(*compare)
    for name, value in (("rounds", rounds), ("steps", steps), ("warmup", warmup)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: {value} is not at least 1")
    if mode != "--attn" and attn is not None and (attn == "all" or "," in attn):
        raise ConfigError(f"--attn: {attn} with {mode} is one backend; name it")
    if mode != "--attn" and profile is not None:
        raise ConfigError(f"--profile: looks into single steps; leave {mode} out")
    if find_micro_batch and micro_batch_size is not None:
        raise ConfigError(
            f"--micro-batch-size: {micro_batch_size} is what --find-micro-batch looks for; leave "
            "it out"
        )
    outputs = OutputFiles(json=as_json, markdown=markdown, plot=plot)
    outputs.check()
    check_folder(profile, "--profile")
    if profile is not None:
        silence_kineto()

    flags = {"speed.dtype": dtype, "speed.compile": compile_, "model.name": model}
    flags |= {"train.micro_batch_size": micro_batch_size, "data.seq_len": seq_len}
    if mode != "--attn":
        flags["speed.attention"] = attn
    settings, workload, find = _workload(flags, set_ or [], model, device)
    speed = settings.speed
    given = {n: v for n, v in speed if n in speed.model_fields_set and v != "auto"}
    if mode in ("--ablate", "--vs") and "compile" not in speed.model_fields_set:
        # `auto` may turn compile off because of its startup time
        speed = speed.model_copy(update={"compile": True})

    from pretrain_cli.engine.benchmark import arms as kinds
    from pretrain_cli.engine.benchmark.rounds import Rounds
    from pretrain_cli.engine.benchmark.workload import Repeats
    from pretrain_cli.engine.runtime.stop import Interruption

    repeats = Repeats(rounds=rounds or (1 if mode == "--attn" else 3), steps=steps, warmup=warmup)
    if find_micro_batch:
        kinds.check_length(workload)
        return search(workload, speed, repeats, outputs)
    if mode == "--ablate":
        arms = kinds.ablation(workload, speed, given)
    elif mode == "--sweep":
        arms = kinds.sweep(workload, speed, sweep or [], find)
    elif mode == "--vs":
        arms = kinds.versus(workload, speed, vs or "")
    else:
        arms = kinds.backend_arms(workload, speed, kinds.parse_backends(attn or "all"))
    if mode != "--sweep":
        kinds.check_length(workload)
    say_workload(workload, repeats, is_swept=mode == "--sweep")
    if mode == "--ablate" and given:
        notice(f"In every arm, as given: {', '.join(f'{n} {v}' for n, v in given.items())}")
    measured = Rounds(arms, repeats)
    command = shlex.join(["pretrain", *sys.argv[1:]])
    with Interruption() as interruption:
        watch(measured, interruption)
        outputs.write(measured, mode.removeprefix("--"), command)
        if profile is not None:
            show_profiles(measured, profile, interruption)
    if interruption.signal:
        raise typer.Exit(interruption.exit_code)
    if measured.failures:
        raise typer.Exit(1)


def _typed(context: typer.Context) -> list[str]:
    """Return the options given on the command line."""
    sources = {p: context.get_parameter_source(str(p.name)) for p in context.command.params}
    return [p.opts[0] for p, source in sources.items() if source and source.name == "COMMANDLINE"]


def _workload(
    flags: dict[str, Any], assignments: list[str], model: str | None, device: str
) -> tuple[Any, Any, Any]:
    """Return (settings, the workload they describe, how to name another model)."""
    from pretrain_cli.config.build import build_config
    from pretrain_cli.config.yaml_files import find_model
    from pretrain_cli.errors import ConfigError

    for assignment in assignments:
        if not assignment.startswith(("speed.", "model.")) or assignment.startswith(NOT_SET):
            raise ConfigError(
                f"--set {assignment}: not a setting of a benchmark; it takes speed.NAME=VALUE and "
                "model.NAME=VALUE, and options for the rest: --attn, --seq-len, …"
            )
    settings = build_config({}, flags, assignments)

    from pretrain_cli.engine.benchmark.workload import Workload, usual_micro_batch
    from pretrain_cli.engine.runtime.distributed import find_device

    place = find_device(device)
    on_cpu = place.type == "cpu"

    def find(name: str) -> tuple[str, Any]:
        return find_model(settings.model.model_copy(update={"name": name}))

    name, config = find(model or ("gemma3-tiny" if on_cpu else "gemma3-270m"))
    seq_len: Any = settings.data.seq_len
    if seq_len == "auto":
        seq_len = min(512 if on_cpu else 1024, config.max_position_embeddings)
    rows: Any = settings.train.micro_batch_size
    if rows == "auto":
        rows = usual_micro_batch(config, seq_len, on_cpu=on_cpu)
    workload = Workload(
        name=name, model=config, seq_len=seq_len, micro_batch_size=rows, device=str(place)
    )
    return settings, workload, find
