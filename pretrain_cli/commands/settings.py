"""`--set` of the commands that write text: speed settings of the whole process, and no others."""

from collections.abc import Sequence
from typing import Annotated

import typer

SPEED = "Speed"
"""Panel of the help."""

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
    """Set what has to be set before torch is loaded."""
    from pretrain_cli.config.build import build_config
    from pretrain_cli.engine.runtime.process_settings import (
        check_process_settings,
        set_env_before_torch,
    )

    check_process_settings("--set", assignments or ())
    set_env_before_torch(build_config({}, {}, assignments or ()).speed)
