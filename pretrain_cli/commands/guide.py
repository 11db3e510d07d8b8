"""`pretrain guide`: the manual, one page per topic."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from pretrain_cli.errors import ConfigError, did_you_mean

PAGES = Path(__file__).parent.parent / "guide"


def guide(
    topic: Annotated[
        str | None, typer.Argument(help="Page to show; without one, the topics are listed.")
    ] = None,
) -> None:
    """Show a page of the manual."""
    pages = topics()
    if topic is None:
        _list(pages)
        return
    if topic not in pages:
        raise ConfigError(
            f"guide: no page '{topic}'{did_you_mean(topic, pages)}; the topics are "
            f"{', '.join(pages)}"
        )
    text = re.sub(r"<!--.*?-->\n*", "", pages[topic].read_text(encoding="utf-8"), flags=re.S)
    if not sys.stdout.isatty():
        typer.echo(text, nl=False)
        return
    console = Console()
    with console.pager(styles=True):
        console.print(Markdown(text), width=min(console.width, 110))


def topics() -> dict[str, Path]:
    """Return the manual's pages by topic, in the order of the manual's index."""
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| \[[^]]+\]\((\S+)\.md\)", index, flags=re.M)
    return {name: PAGES / f"{name}.md" for name in names}


def summary(page: Path) -> str:
    """Return a page's first paragraph, a one-sentence summary."""
    paragraphs = page.read_text(encoding="utf-8").split("\n\n")
    return " ".join(paragraphs[1].split())


def _list(pages: dict[str, Path]) -> None:
    if not sys.stdout.isatty():
        width = max(map(len, pages))
        for name, page in pages.items():
            typer.echo(f"{name:{width}}  {summary(page)}")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, page in pages.items():
        table.add_row(f"[bold]{name}[/]", Markdown(summary(page)))
    console = Console()
    console.print(table)
    console.print("\nShow a page: [bold]pretrain guide TOPIC[/]")
