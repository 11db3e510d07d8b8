"""Shared behaviour of options: empty values are errors, and `--set` for process settings.

Without the check, `--attn ""`, as from an unset shell variable, would act like no option.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from pretrain_cli.errors import ConfigError

MAY_BE_EMPTY = ("prompt", "document_separator")
"""Options whose empty value has a meaning: no prompt; an empty line between documents."""


class Command(TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        refuse_empty(ctx)
        return super().invoke(ctx)


class Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        refuse_empty(ctx)
        return super().invoke(ctx)


def refuse_empty(context: Any) -> None:
    """Raise ConfigError for the first empty value."""
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        several = value if isinstance(value, list | tuple) else [value]
        if "" in several and parameter.name not in MAY_BE_EMPTY:
            name = parameter.opts[0]  # an option's first flag, or an argument's name
            raise ConfigError(f"{name}: is empty; give a value, or leave it out")


SPEED = "Speed"
"""Panel title in the help."""

OfProcess = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SPEED.NAME=VALUE",
        help="A speed setting of the process, such as speed.passive_threads=false. Repeatable.",
        rich_help_panel=SPEED,
    ),
]


def settle_process(assignments: Sequence[str] | None) -> None:
    """Set environment variables from `--set`. Must be called before torch is imported."""
    from pretrain_cli.config.build import build_config
    from pretrain_cli.engine.runtime.process_settings import (
        check_process_settings,
        set_env_before_torch,
    )

    check_process_settings("--set", assignments or ())
    set_env_before_torch(build_config({}, {}, assignments or ()).speed)
