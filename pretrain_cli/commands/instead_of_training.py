"""`pretrain train --check-resume`, which tests that resuming is exact, and `--plan`, which shows a
run as it would be."""

from typing import Any, NoReturn

import typer
from rich.markup import escape

from pretrain_cli.commands.display import TrainDisplay, console
from pretrain_cli.units import amount

STOPPED = 75
"""Exit code of a run that stopped with steps left, on a signal or at --max-time, after saving:
EX_TEMPFAIL of sysexits.h, "try again". Schedulers can requeue the job on it."""


def prove_resume(settings: Any, steps: int, display: TrainDisplay, stop: Any) -> NoReturn:
    """Compare a resumed run with an uninterrupted one. Exits with code 0 if they are equal, else 1;
    STOPPED if the check itself was stopped."""
    from pretrain_cli.engine.runtime.stop import Stopped
    from pretrain_cli.engine.training.check_resume import check_resume

    try:
        found = check_resume(settings, steps, display, stop)
    except Stopped:
        raise typer.Exit(STOPPED) from None
    if found.difference:
        console.print(f"[red]Not equal.[/] First: {escape(found.difference)}", soft_wrap=True)
        raise typer.Exit(1)
    console.print(
        f"[green]Equal, bit for bit:[/] {found.numbers} logged numbers, {found.tensors} tensors of "
        "weights and optimizer",
        soft_wrap=True,
    )
    raise typer.Exit(0)


def show_plan(settings: Any, display: TrainDisplay, stop: Any) -> None:
    """Resolve a run's settings, with the notices that the run would give, and print the plan."""
    from pretrain_cli.engine.planning.plan import make_plan
    from pretrain_cli.engine.runtime.distributed import open_ranks
    from pretrain_cli.model.counting import count_parameters

    with open_ranks(settings.train.device) as ranks:
        plan = make_plan(settings, ranks, display, stop)
    model, recipe = plan.model, plan.recipe
    there = sum(len(source.dataset.train.tokens) for source in plan.data.sources)
    lines = {
        "model": f"{plan.name}, {amount(count_parameters(model).total)} parameters, "
        f"{model.vocab_size:,} rows of the vocabulary",
        "data": f"{plan.data.name}, {amount(there)} tokens, tokenizer {plan.data.tokenizer.name}",
        "steps": f"{plan.steps:,} of {plan.tokens_per_step:,} tokens ({plan.samples_per_step:,} "
        f"samples of {plan.seq_len:,}), {amount(plan.steps * plan.tokens_per_step)} in all",
        **{f"after {s.first_step:,}": str(s) for s in plan.stages[1:]},
        "micro-batch": f"{plan.micro_batch_size:,}",
        "learning rate": f"{recipe.learning_rate:g} after {recipe.warmup_steps:,} steps of "
        f"warm-up, {settings.optimizer.schedule}, {recipe.name}; embedding "
        f"{recipe.embedding_rate:g}; weight decay {recipe.weight_decay:g}",
        "saves": f"every {plan.checkpoint_every:,} steps; validation every {plan.eval_every:,}",
    }
    for name, line in lines.items():
        console.print(f"[bold]{name:<14}[/]{escape(line)}", soft_wrap=True)
