"""One rule for every option and argument: what is empty is no value.

`--attn ""`, as from a shell's variable that isn't set, would otherwise be as good as no option.
"""

from typing import Any

from typer.core import TyperCommand, TyperGroup

from pretrain_cli.errors import ConfigError

MAY_BE_EMPTY = ("prompt", "document_separator")
"""Nothing to go on from; an empty line between documents."""


class Command(TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        refuse_empty(ctx)
        return super().invoke(ctx)


class Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        refuse_empty(ctx)
        return super().invoke(ctx)


def refuse_empty(context: Any) -> None:
    """Raise ConfigError for the first value that was given and is empty."""
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        several = value if isinstance(value, list | tuple) else [value]
        if "" in several and parameter.name not in MAY_BE_EMPTY:
            name = parameter.opts[0]  # of an argument, its name
            raise ConfigError(f"{name}: is empty; give a value, or leave it out")
