"""Options: an empty value is refused."""

import inspect
import typing

import pytest
from typer.main import get_command

from pretrain_cli.cli import app
from pretrain_cli.commands.options import MAY_BE_EMPTY


def texts():
    """Yield each text option and argument: a command line that leaves it empty, and its name."""

    def of(line, command):
        kinds = typing.get_type_hints(inspect.unwrap(command.callback))
        required = " ".join("x" for p in command.params if p.required and p.opts[0][0] != "-")
        for parameter in command.params:
            taken = {kinds.get(parameter.name), *typing.get_args(kinds.get(parameter.name))}
            name = parameter.opts[0]
            if {str, list[str]} & taken and parameter.name not in MAY_BE_EMPTY:
                given = f"{required} {name} ''" if name[0] == "-" else "''"
                yield pytest.param(f"{line} {given}", name, id=f"{line} {name}")
        for name, each in getattr(command, "commands", {}).items():
            yield from of(f"{line} {name}".strip(), each)

    for name, command in get_command(app).commands.items():  # pyright: ignore
        yield from of(name, command)


@pytest.mark.parametrize(("line", "name"), list(texts()))
def test_an_empty_option_value_is_refused(refused, line, name):
    assert refused(line) == f"{name}: is empty; give a value, or leave it out"
