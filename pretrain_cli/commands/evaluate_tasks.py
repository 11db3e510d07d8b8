"""`pretrain evaluate --tasks`: a model's scores on tasks of lm-evaluation-harness."""

import json
from dataclasses import asdict
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from pretrain_cli.commands.display import console, notice, remark


def show_tasks(as_json: bool, **asked: Any) -> None:
    from pretrain_cli.engine.evaluation.lm_eval import TaskRequest, evaluate_tasks

    result = evaluate_tasks(TaskRequest(**asked), remark if as_json else notice)
    if as_json:
        facts = asdict(result)
        typer.echo(json.dumps({"checkpoint": str(facts.pop("folder")), **facts}, indent=2))
        return
    console.print(
        f"[bold]{escape(str(result.folder))}[/], texts of up to {result.seq_len:,} tokens, "
        f"{result.quantize or result.dtype}, lm-eval {result.harness}",
        soft_wrap=True,
    )
    console.print(_table(result.scores))


def _table(scores: list[Any]) -> Table:
    table = Table()
    table.add_column("task")
    table.add_column("measure")
    for heading in ("value", "± stderr", "questions", "examples shown"):
        table.add_column(heading, justify="right")
    before = None
    for score in scores:
        measure = score.measure if score.filter == "none" else f"{score.measure}, {score.filter}"
        table.add_row(
            "" if score.task == before else escape(score.task),
            escape(measure),
            f"{score.value:.4f}",
            "" if score.stderr is None else f"{score.stderr:.4f}",
            f"{score.questions:,}" if score.questions else "",
            str(score.shots),
        )
        before = score.task
    return table
