"""`pretrain benchmark --find-micro-batch`: the largest micro-batch that fits, and the fastest."""

import shlex
import sys
from typing import Any

import typer
from rich.markup import escape

from pretrain_cli.commands.benchmark.show import OutputFiles, say_workload, watch
from pretrain_cli.commands.display import console, size


def search(workload: Any, speed: Any, repeats: Any, outputs: OutputFiles) -> None:
    """Measure, show the results, and save them for `pretrain train`."""
    import torch

    from pretrain_cli.engine.benchmark.search import MicroBatchSearch
    from pretrain_cli.engine.planning import micro_batch
    from pretrain_cli.engine.runtime.distributed import device_name
    from pretrain_cli.engine.runtime.stop import Interruption
    from pretrain_cli.errors import ConfigError

    place = torch.device(workload.device)
    measured = MicroBatchSearch(workload, speed, repeats, room=int(micro_batch.memory_here(place)))
    if measured.estimate(1) > measured.room:
        raise ConfigError(
            f"--find-micro-batch: a micro-batch of 1 takes about {size(measured.estimate(1))}, and "
            f"{size(measured.room)} may be used; give a smaller model, or --seq-len"
        )
    say_workload(workload, repeats, is_swept=True)
    command = shlex.join(["pretrain", *sys.argv[1:]])
    with Interruption() as interruption:
        watch(measured, interruption)
        outputs.write(measured, "find-micro-batch", command)
    if interruption.signal:
        raise typer.Exit(interruption.exit_code)  # an incomplete search stores nothing
    found = measured.found()
    if found is None:
        raise typer.Exit(1)  # the table shows the reason
    rate = found.tokens_per_second[found.fastest]
    memory, largest_memory = (size(found.peaks[rows]) for rows in (found.fastest, found.largest))
    console.print(
        f"Fastest: micro-batch [bold]{found.fastest}[/], {rate:,.0f} tokens/s, {memory}\n"
        f"Largest: micro-batch [bold]{found.largest}[/], {largest_memory}; {escape(found.limit)}",
        soft_wrap=True,
    )
    micro_batch.remember(
        micro_batch.measured(
            device_name(place),
            workload.model,
            workload.seq_len,
            measured.in_force,
            found.tokens_per_second,
        )
    )
    console.print(
        f"Kept in {micro_batch.MEASURED}: pretrain train takes the fastest that divides its step, "
        "for this model, length and settings",
        soft_wrap=True,
    )
