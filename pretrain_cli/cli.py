"""The `pretrain` command line. Users' mistakes print one red line and exit with code 2."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from pretrain_cli import __version__
from pretrain_cli.commands import (
    count_params,
    evaluate,
    export,
    guide,
    inspect,
    report,
    sample,
    tokenize,
    train,
    verify,
)
from pretrain_cli.commands.benchmark import command as benchmark
from pretrain_cli.commands.display import error_console
from pretrain_cli.commands.options import Command
from pretrain_cli.errors import PretrainError
from pretrain_cli.files import advice_on_limit


class Commands(TyperGroup):
    """Group of all commands. Prints one line and exits with code 2 if a command raises a
    PretrainError, lacks permission for a file, or reaches a limit of the system: disk, memory or
    open files."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PretrainError as error:
            error_console.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from None
        except PermissionError as error:
            why = f"{error.filename}: may not be read or written ({error.strerror})"
            error_console.print(f"[red]error:[/] {escape(why)}; change who may", soft_wrap=True)
            raise typer.Exit(2) from None
        except OSError as error:
            if advice := advice_on_limit(error):
                why = f"{error.filename or 'a file'}: {error.strerror}; {advice}"
                error_console.print(f"[red]error:[/] {escape(why)}", soft_wrap=True)
                raise typer.Exit(2) from None
            raise
        except MemoryError:
            why = "memory ran out; give this process more of it, or the run smaller settings"
            error_console.print(f"[red]error:[/] {escape(why)}", soft_wrap=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Pretrain Gemma 3 and Qwen 3 models: from a folder of text to a model that transformers "
    "opens.",
)
PANELS = {
    "Train a model": {
        "tokenize": (tokenize.tokenize, "data"),
        "train": (train.train, "training"),
        "sample": (sample.sample, "sampling"),
    },
    "Look at the result": {
        "report": (report.report, "monitoring"),
        "evaluate": (evaluate.evaluate, "evaluation"),
        "verify": (verify.verify, "evaluation"),
        "export": (export.export, "export"),
        "inspect": (inspect.inspect, "data"),
    },
    "Before you train": {
        "count-params": (count_params.count_params, "models"),
        "benchmark": (benchmark.app, "benchmarks"),
        "guide": (guide.guide, ""),
    },
}
"""Panel of `pretrain --help` → command → (function, manual page named at the end of its help)."""

for panel, commands in PANELS.items():
    for name, (command, page) in commands.items():
        more = f"Manual: pretrain guide {page}" if page else None
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=panel, epilog=more)
        else:
            app.command(name, cls=Command, rich_help_panel=panel, epilog=more)(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pretrain {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass
