"""Elements of HTML, in which whatever comes from a file is text."""

from html import escape
from typing import Any

from pretrain_cli.engine.report.history import History

COLORS = 8


def text(value: Any) -> str:
    """Anything from a file, as text of a page."""
    return escape(str(value))


def tag(name: str, content: str, **attributes: str) -> str:
    """An element; `content` is HTML already, attributes are not."""
    given = "".join(f' {key.rstrip("_")}="{text(value)}"' for key, value in attributes.items())
    return f"<{name}{given}>{content}</{name}>"


def title(histories: list[History], number: int) -> str:
    """A run's name, and among several its colour."""
    name = text(histories[number].name)
    if len(histories) == 1:
        return name
    return tag("span", "", class_=f"swatch c{number % COLORS}") + name
