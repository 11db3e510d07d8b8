"""`pretrain train`: train a model on a dataset, into a run folder."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain_cli.commands.display import TrainDisplay, notice
from pretrain_cli.commands.instead_of_training import STOPPED, prove_resume, show_plan
from pretrain_cli.commands.lr_find import RANGE_TEST_STEPS, refuse_meaningless, suggest_rate


def train(
    model: Annotated[
        str | None,
        typer.Option(
            help="A name (gemma3, gemma3-1b, qwen3-0.6b, gemma3-tiny, …) or a YAML file.",
            show_default="gemma3, the 270M",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATASET[:WEIGHT] …",
            help="A tokenized dataset, or .bin files of llm.c, modded-nanogpt or nanoGPT: one, a "
            "pattern in quotes, or their folder. Several are mixed, by weights (a:0.7 b:0.3) or by "
            "size.",
            show_default="the one in data/, or a demo dataset",
        ),
    ] = None,
    more_data: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATASET", help="More datasets, after the first of --data."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of .bin files, as for pretrain tokenize.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a sample.", show_default="512 on a CPU, 1024 else")
    ] = None,
    packing: Annotated[
        str | None,
        typer.Option(
            help="concat: windows over all documents in a row. best-fit: whole documents, padded.",
            show_default="concat",
        ),
    ] = None,
    document_mask: Annotated[
        bool | None,
        typer.Option("--document-mask", help="Stop attention at document boundaries."),
    ] = None,
    micro_batch_size: Annotated[
        str | None,
        typer.Option(
            help="Samples per micro-step; auto: the fastest that pretrain benchmark "
            "--find-micro-batch "
            "measured here, else the largest estimated to fit.",
            show_default="auto",
        ),
    ] = None,
    tokens_per_step: Annotated[
        int | None,
        typer.Option(
            help="Tokens per optimizer step; gradients accumulate.",
            show_default="by the run's tokens",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps.", show_default="by the device")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Training tokens, such as 5B or 200M; instead of --steps."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest.", show_default="by the model's width")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="muon for the layers' matrices, or adamw.", show_default="muon"),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Learning rate after warm-up: cosine, linear, wsd, wsd-sqrt, constant.",
            show_default="wsd",
        ),
    ] = None,
    lr_find: Annotated[
        bool,
        typer.Option("--lr-find", help="Suggest a learning rate by a short range test, then stop."),
    ] = False,
    max_time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Save and stop before the process reaches this age: 90s, 15m, 3h55m, 1d. For "
            "this process only: give it again with --resume.",
            show_default="no limit",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of weights and data order.", show_default="0")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N, mps.", show_default="cuda, else cpu")
    ] = None,
    attn: Annotated[
        str | None,
        typer.Option(
            help="Attention: eager, sdpa, blocks, flex, varlen.",
            show_default="blocks on a CPU, varlen on a GPU, else sdpa",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Compute in float32, bfloat16 or float8.", show_default="by the device"),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile.", show_default="on a GPU"),
    ] = None,
    skip_spikes: Annotated[
        float | None,
        typer.Option(
            metavar="K",
            help="Skip steps whose loss or gradient norm is K standard deviations above its mean.",
            show_default="none",
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(help="Newest checkpoints to keep, besides the best.", show_default="2"),
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(help="Also keep a checkpoint every N steps.", show_default="none")
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Largest size of a weights file; larger weights are split.",
            show_default="5GB",
        ),
    ] = None,
    eval_tokens: Annotated[
        int | None,
        typer.Option(help="Validate on only this many tokens of each split.", show_default="all"),
    ] = None,
    log: Annotated[
        str | None,
        typer.Option(
            help="Trackers: tensorboard, wandb or both, with a comma.", show_default="neither"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/MODEL-DATASET")
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Start from the weights of a Hugging Face model folder.")
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic",
            help="Bitwise reproducible results on a GPU too, where kernels allow it.",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Resume a run from its newest intact checkpoint.")
    ] = None,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change", help="Let --resume change settings that affect what is learned."
        ),
    ] = False,
    check_resume: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Check that resuming is exact: N steps in one go against N/2, saved and resumed.",
        ),
    ] = None,
    profile: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            help="Profile this many steps: a Chrome trace in the run folder, top operators, parts "
            "of a step.",
            show_default="none",
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Resolve every setting, show the plan of the run, and stop."),
    ] = False,
    config: Annotated[
        str | None, typer.Option(help="YAML file of settings, or the name of a built-in one.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.NAME=VALUE", help="Change any other setting. Repeatable."
        ),
    ] = None,
) -> None:
    """Train a model.

    Without a dataset, it makes a small one from the Python standard library's sources. Ctrl-C,
    SIGTERM, SIGUSR1 and --max-time save and stop; if steps remain, the exit code is 75 and --resume
    continues. A second signal exits at once. On several GPUs: torchrun
    --nproc-per-node N -m pretrain_cli train …
    """
    flags: dict[str, Any] = {
        "model.name": model,
        "model.init_from": init_from,
        "data.path": [*data, *(more_data or [])] if data else None,
        "data.tokenizer": tokenizer,
        "data.seq_len": seq_len,
        "data.packing": packing,
        "data.document_mask": document_mask,
        "train.micro_batch_size": _number(micro_batch_size),
        "train.tokens_per_step": tokens_per_step,
        "train.steps": steps,
        "train.tokens": tokens,
        "optimizer.learning_rate": learning_rate,
        "optimizer.name": optimizer,
        "optimizer.schedule": schedule,
        "train.max_time": max_time,
        "train.seed": seed,
        "train.device": device,
        "speed.attention": attn,
        "speed.dtype": dtype,
        "speed.compile": compile_,
        "train.skip_spikes": skip_spikes,
        "train.keep_checkpoints": keep,
        "train.keep_every": keep_every,
        "train.max_shard_size": max_shard_size,
        "train.eval_tokens": eval_tokens,
        "train.log": log,
        "speed.deterministic": deterministic,
        "train.out": out,
    }
    from pretrain_cli.config.build import build_config
    from pretrain_cli.config.yaml_files import read_config
    from pretrain_cli.errors import ConfigError

    if more_data and not data:
        raise ConfigError(f"{more_data[0]}: is it a dataset? give it with --data {more_data[0]}")
    if resume is not None and config is not None:
        raise ConfigError(f"--config: {config} does not go with --resume, which has the run's own")
    if lr_find:
        refuse_meaningless(resume, flags)
        flags["train.steps"] = steps or RANGE_TEST_STEPS  # overrides --config
    if allow_change and resume is None:
        raise ConfigError("--allow-change: goes with --resume, whose settings it lets change")
    if check_resume is not None and resume is not None:
        raise ConfigError(f"--check-resume: begins a run of its own; leave --resume {resume} out")
    if check_resume is not None and lr_find:
        raise ConfigError("--check-resume: trains as the settings say; leave --lr-find out")
    if plan and (resume is not None or lr_find or check_resume is not None):
        raise ConfigError("--plan: of a new run; leave --resume, --lr-find, --check-resume out")
    if profile is not None and profile < 1:
        raise ConfigError(f"--profile: {profile} is not at least 1 step")
    if profile is not None and (lr_find or check_resume is not None):
        raise ConfigError(
            "--profile: looks into a run's steps; leave --lr-find, --check-resume out"
        )
    if resume is None:
        settings = build_config(read_config(config) if config else {}, flags, set_ or [])
        where = {}
    else:
        from pretrain_cli.engine.runs.run_yaml import settings_to_resume

        settings, where = settings_to_resume(resume, flags, set_ or [], allow_change=allow_change)
    from pretrain_cli.engine.runtime.process_settings import set_env_before_torch, silence_kineto
    from pretrain_cli.engine.runtime.stop import Stopped, StopRequest

    with StopRequest(limit=settings.train.max_time) as stop, TrainDisplay() as display:
        set_env_before_torch(settings.speed)
        if profile is not None:
            silence_kineto()
        if check_resume is not None:
            prove_resume(settings, check_resume, display, stop)
        from pretrain_cli.engine.training.train import train as run

        try:
            if plan:
                show_plan(settings, display, stop)
                return
            if lr_find:
                suggest_rate(settings, out, display, stop)
                return
            reason = run(settings, display, stop=stop, profile=profile or 0, **where).reason
        except Stopped:
            reason = "stopped"
            notice(f"{stop.reason}: stopped before training began; the same command begins again")
    if reason == "stopped":
        raise typer.Exit(STOPPED)


def _number(text: str | None) -> int | str | None:
    """Return digits as an int, and any other text unchanged; the settings validate it."""
    return int(text) if text is not None and text.isdecimal() else text
