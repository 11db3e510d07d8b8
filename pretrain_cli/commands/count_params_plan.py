"""`pretrain count-params --plan`: the memory, time and disk space that a run would need."""

import json
from dataclasses import dataclass
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from pretrain_cli.commands.display import console, size
from pretrain_cli.units import amount, duration, in_number

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "copies": "weights in the products' type",
    "activations": "activations",
    "masks": "attention masks",
    "logits": "logits",
    "gathered": "gathered from the other GPUs",
    "process": "the program and its libraries",
    "lost": "lost between allocations",
}
PHASES = {
    "loss": "when the loss is computed",
    "backward": "when the backward pass begins",
    "gradients": "when the backward pass ends",
    "step": "in the optimizer's step",
}


@dataclass(frozen=True)
class Asked:
    """Options of --plan, as typed."""

    tokens: str | None
    device: str | None
    gpus: int | None
    micro_batch_size: int | None
    dtype: str | None
    compile: bool | None
    mfu: float | None
    calibrate: bool

    def refuse_alone(self) -> None:
        """Raise ConfigError if any option was given; they need --plan."""
        from pretrain_cli.errors import ConfigError

        for name, value in vars(self).items():
            if value not in (None, False) or (value is False and name == "compile"):
                raise ConfigError(f"--{name.replace('_', '-')}: goes with --plan")

    def check(self) -> None:
        from pretrain_cli.errors import ConfigError

        for name, value in (("gpus", self.gpus), ("micro-batch-size", self.micro_batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name}: {value} is not at least 1")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise ConfigError(f"--mfu: {self.mfu:g} is not above 0 and at most 1")
        if self.mfu is not None and self.calibrate:
            raise ConfigError(f"--mfu: {self.mfu:g} is what --calibrate measures; give one")


def show_plan(name: str, config: Any, seq_len: int, asked: Asked, *, as_json: bool) -> None:
    """Estimate a run of the model and print the estimate."""
    from pretrain_cli.config.build import build_config
    from pretrain_cli.engine.planning.run_estimate import find_machine, forecast

    asked.check()
    flags = {"speed.dtype": asked.dtype, "speed.compile": asked.compile}
    speed = build_config({}, flags, []).speed
    machine = find_machine(asked.device, asked.gpus or 1, speed, config)
    found = forecast(
        name,
        config,
        seq_len,
        machine,
        micro_batch_size=asked.micro_batch_size,
        tokens=_tokens(asked.tokens),
        mfu=asked.mfu,
    )
    if asked.calibrate:
        found = _calibrated(found, config, speed, asked)
    if as_json:
        typer.echo(json.dumps(found.record(), indent=2))
        return
    _show(found, is_fixed=asked.micro_batch_size is not None, is_given=asked.tokens is not None)


def _tokens(words: str | None) -> int | None:
    from pretrain_cli.errors import ConfigError

    try:
        return None if words is None else in_number(words)
    except ValueError:
        raise ConfigError(f"--tokens: '{words}' is not a number such as 5B or 200M") from None


def _calibrated(plan: Any, config: Any, speed: Any, asked: Asked) -> Any:
    """Time real steps on this machine's device; return the plan with the measured throughput."""
    from dataclasses import replace

    from pretrain_cli.engine.benchmark.rounds import calibrate
    from pretrain_cli.engine.benchmark.workload import Workload, usual_micro_batch
    from pretrain_cli.engine.planning.run_estimate import Throughput
    from pretrain_cli.engine.runtime.gpu_specs import called
    from pretrain_cli.errors import ConfigError

    machine = plan.machine
    if asked.device is not None and called(asked.device):
        raise ConfigError(
            f"--calibrate: times steps on the device that is here; leave --device {asked.device} "
            "out"
        )
    rows = asked.micro_batch_size or min(
        usual_micro_batch(config, plan.seq_len, on_cpu=machine.device == "cpu"),
        *(way.micro_batch_size for way in plan.ways.values()),
    )
    workload = Workload(
        name=plan.model,
        model=config,
        seq_len=plan.seq_len,
        micro_batch_size=rows,
        device=machine.device,
    )
    with console.status(f"timing steps of {rows} × {plan.seq_len} tokens"):
        figures = calibrate(workload, speed)
    source = f"measured on {machine.name}, {rows} × {plan.seq_len:,} tokens a step"
    pace = Throughput(machine.gpus * figures.tokens_per_second, figures.mfu, source)
    return replace(plan, pace=pace)


def _show(plan: Any, *, is_fixed: bool, is_given: bool) -> None:
    machine = plan.machine
    each = f"{machine.gpus} × {machine.name}" if machine.gpus > 1 else machine.name
    speed = machine.speed
    console.print(
        f"[bold]{escape(plan.model)}[/] {plan.parameters:,} parameters, {plan.seq_len:,} tokens a "
        f"sample, on {escape(each)}: {speed['dtype']}, attention {speed['attention']}, "
        f"{'compiled' if speed['compile'] else 'not compiled'}",
        soft_wrap=True,
    )
    console.print(_table(plan))
    for name, way in plan.ways.items():
        label = f"{name}: micro-batch" if len(plan.ways) > 1 else "Micro-batch"
        peak, room = size(way.memory.peak), f"the {size(machine.memory)} that a run may take"
        if not way.fits:
            console.print(
                f"[red]{label} {way.micro_batch_size} does not fit:[/] it takes {peak}, more than "
                f"{room}",
                soft_wrap=True,
            )
            continue
        what = "as asked" if is_fixed else "the largest that fits"
        console.print(
            f"{label} [bold]{way.micro_batch_size}[/], {what}: {peak} of {room}, "
            f"{PHASES[way.memory.phase]}",
            soft_wrap=True,
        )
    tokens = f"{amount(plan.tokens)} tokens" + ("" if is_given else " (20 a parameter)")
    if plan.pace is None:
        console.print(f"{tokens}: time not known; --calibrate times real steps")
    else:
        console.print(
            f"{tokens} in [bold]{duration(plan.seconds)}[/]: {plan.pace.tokens_per_second:,.0f} "
            f"tokens/s at an MFU of {plan.pace.mfu:.0%}, {escape(plan.pace.source)}",
            soft_wrap=True,
        )
    console.print(
        f"A checkpoint takes {size(plan.checkpoint)}, and all that are there at a time "
        f"{size(plan.checkpoints)}. Sampling in bfloat16: weights {size(plan.sampling_weights)}, "
        f"keys and values {size(plan.sampling_cache)} for a text of {plan.seq_len:,} tokens",
        soft_wrap=True,
    )


def _table(plan: Any) -> Table:
    """Return a table of peak memory by part. Parts peak at different moments, so the total may be
    less than their sum."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("memory" if plan.machine.gpus == 1 else "memory of each")
    headings = {"ddp": "a copy on each (ddp)", "fsdp": "a part on each (fsdp)"}
    for name in plan.ways:
        table.add_column(headings[name] if len(plan.ways) > 1 else "", justify="right")
    memories = [way.memory for way in plan.ways.values()]
    for part, label in PARTS.items():
        cells = [memory.most(part) for memory in memories]
        if any(cells):
            table.add_row(label, *[size(cell) if cell else "—" for cell in cells])
    table.add_section()
    totals = [size(memory.peak) for memory in memories]
    table.add_row("[bold]the most at once", *[f"[bold]{total}" for total in totals])
    return table
