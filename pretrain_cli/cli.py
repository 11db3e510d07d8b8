"""The `pretrain` command: commands, and people's mistakes as one red line and exit code 2."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from pretrain_cli import __version__
from pretrain_cli.commands import (
    count_params,
    evaluate,
    export,
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
from pretrain_cli.files import is_disk_full


class Commands(TyperGroup):
    """The group of commands; it turns a PretrainError of any of them, and the refusal of a file
    that this user may not read or write or that the disk has no room for, into a line."""

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
            if not is_disk_full(error):
                raise
            why = f"{error.filename or 'a file'}: {error.strerror}; make room"
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
app.command("tokenize", cls=Command, rich_help_panel="The main line")(tokenize.tokenize)
app.command("train", cls=Command, rich_help_panel="The main line")(train.train)
app.command("sample", cls=Command, rich_help_panel="The main line")(sample.sample)
app.command("report", cls=Command, rich_help_panel="What there is")(report.report)
app.command("evaluate", cls=Command, rich_help_panel="What there is")(evaluate.evaluate)
app.command("verify", cls=Command, rich_help_panel="What there is")(verify.verify)
app.command("export", cls=Command, rich_help_panel="What there is")(export.export)
app.command("inspect", cls=Command, rich_help_panel="What there is")(inspect.inspect)
app.add_typer(benchmark.app, name="benchmark", rich_help_panel="What it costs")
app.command("count-params", cls=Command, rich_help_panel="What it costs")(count_params.count_params)


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
