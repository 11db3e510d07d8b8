"""Output shared by the commands: live and coloured on a terminal, plain lines elsewhere."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from pretrain_cli.units import amount, duration, size

if TYPE_CHECKING:
    from pretrain_cli.engine.runs import events

# Without a terminal rich assumes 80 columns, too few for the tables.
console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 120)
error_console = Console(stderr=True, highlight=False, emoji=False)


SECONDS_A_LINE = 2.0
"""Minimum seconds between printed steps without a live panel; metrics.jsonl has every step."""


def notice(text: str) -> None:
    """Print a choice made for the user, or a fallback, to standard output."""
    console.print(f"[yellow]·[/] {escape(text)}", soft_wrap=not console.is_terminal)


def remark(text: str) -> None:
    """Print a notice to standard error, for commands whose output another program reads."""
    error_console.print(f"[yellow]·[/] {escape(text)}", soft_wrap=True)


def check_output(path: Path | None, option: str = "--json") -> None:
    """Raise ConfigError for a file that can't be written, before computing its contents."""
    from pretrain_cli.errors import ConfigError

    if path is not None and path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder; give a file")
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{option}: no folder {path.parent} to write {path.name} in")


def check_folder(path: Path | None, option: str) -> None:
    """Raise ConfigError for a folder that can't be created, before computing its contents."""
    from pretrain_cli.errors import ConfigError

    if path is not None:
        there = next(place for place in (path, *path.parents) if place.exists())
        if not there.is_dir():
            raise ConfigError(f"{option}: {there} is a file; give a folder")


def write_json(path: Path, value: Any) -> None:
    """Write a command's results to a file, and print its path."""
    path.write_text(json.dumps(value, indent=2) + "\n")
    console.print(f"Written to {escape(str(path))}", soft_wrap=True)


class TokenizeProgress:
    """Progress bar with MB/s and tokens/s; tokenizing calls it with its progress."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            Rate(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("reading", total=None, tokens=0)
        self.what = ""
        self.began = time.perf_counter()

    def __enter__(self) -> "TokenizeProgress":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def __call__(self, what: str, done: int, total: int, tokens: int) -> None:
        if what != self.what:
            self.what, self.began = what, time.perf_counter()
        seconds = max(time.perf_counter() - self.began, 1e-9)
        rate = f"{done / seconds / 1e6:.1f} MB/s"
        if tokens:
            rate += f"  {amount(tokens / seconds)} tokens/s"
        self.progress.update(self.task, description=what, completed=done, total=total, rate=rate)


class Rate(ProgressColumn):
    """Column that shows the task's latest rate."""

    def render(self, task: Any) -> Text:
        return Text(task.fields.get("rate", ""))


def profile_table(title: str, profile: Any) -> RenderableType:
    """Return a table of a profile: time per part of a step and per operator."""
    whole = max(profile.seconds, 1e-9)
    parts = Table(
        box=SIMPLE_HEAD,
        title=f"{escape(title)}: {profile.seconds * 1e3:,.1f} ms a step while profiled",
        title_justify="left",
    )
    operators = Table(box=SIMPLE_HEAD)
    for table, heading in ((parts, "part"), (operators, "operator, by itself")):
        table.add_column(heading)
        for column in ("ms", "share"):
            table.add_column(column, justify="right")
    operators.add_column("calls", justify="right")
    for name, seconds in profile.parts.items():
        parts.add_row(name, f"{seconds * 1e3:,.1f}", f"{seconds / whole:.1%}")
    for each in profile.operators:
        operators.add_row(
            Text(each.name, overflow="ellipsis", no_wrap=True),
            f"{each.seconds * 1e3:,.1f}",
            f"{each.seconds / whole:.1%}",
            f"{each.calls:,.0f}",
        )
    where = Text(f"Trace, for ui.perfetto.dev: {profile.trace}")
    return Group(parts, operators, where)


class TrainDisplay:
    """Display of a training run: printed lines, with a live panel below them on a terminal."""

    def __init__(self) -> None:
        self.live: Live | None = None
        self.steps = self.tokens_per_step = 0
        self.evaluation: events.Evaluation | None = None
        self.printed = -SECONDS_A_LINE
        self.sources: dict[str, int] = {}

    def __enter__(self) -> "TrainDisplay":
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_live()

    def __call__(self, event: "events.Event") -> None:
        """Show an event of the engine."""
        from pretrain_cli.engine.runs import events

        match event:
            case events.Notice():
                notice(event.text)
            case events.Started():
                self.on_started(event)
            case events.StepMetrics():
                self.on_step(event)
            case events.Evaluation():
                self.on_evaluation(event)
            case events.Skipped():
                self.on_skipped(event)
            case events.RolledBack():
                self.on_rolled_back(event)
            case events.Profiled():
                console.print(profile_table(f"Up to step {event.step:,}", event.profile))
            case events.Saved():
                self.on_saved(event)
            case events.Unsaved():
                self.on_unsaved(event)
            case events.Sample():
                self.on_sample(event)
            case events.Finished():
                self.on_finished(event)
            case _:
                assert_never(event)

    def on_started(self, event: "events.Started") -> None:
        self.steps, self.tokens_per_step = event.steps, event.tokens_per_step
        console.print(
            f"[bold]{escape(event.model)}[/] {amount(event.parameters)} parameters on "
            f"{escape(event.dataset)}, {escape(event.device)}\n"
            f"{event.tokens_per_step:,} tokens a step, {event.flops_per_token / 1e9:.3g} GFLOP a "
            f"token, steps {event.step:,} to {event.steps:,}  →  {escape(str(event.run))}\n"
            f"MFU of {event.peak_flops / 1e12:.3g} TFLOP/s, {escape(event.peak_source)}",
            soft_wrap=True,
        )
        if console.is_terminal:
            self.live = Live(console=console, refresh_per_second=4, transient=True)
            self.live.start()

    def on_step(self, event: "events.StepMetrics") -> None:
        self.sources = event.sources
        if self.live:
            self.live.update(self._panel(event))
            return
        now = time.perf_counter()
        if now - self.printed < SECONDS_A_LINE and event.step < self.steps:
            return
        self.printed = now
        parts = [
            f"step {event.step:,}/{self.steps:,}",
            f"loss {event.loss:.4f}",
            f"lr {event.learning_rate:.2e}",
            f"norm {event.gradient_norm:.2f}",
            f"{event.tokens_per_second:,.0f} tokens/s",
            f"MFU {event.mfu:.1%}",
            f"{amount(event.tokens)} tokens",
            f"ETA {duration(self._remaining(event))}",
            f"memory {_memory(event)}",
        ]
        console.print("  ".join(parts), soft_wrap=True)

    def on_evaluation(self, event: "events.Evaluation") -> None:
        self.evaluation = event
        of = f" of {event.split_tokens:,}" if event.split_tokens > event.tokens else ""
        console.print(
            f"[cyan]step {event.step:,}: validation loss {event.loss:.4f}, perplexity "
            f"{event.perplexity:.4g}, {event.bits_per_byte:.4f} bits per byte[/] "
            f"({event.tokens:,}{of} tokens)",
            soft_wrap=True,
        )
        for name, source in event.sources.items():
            console.print(
                f"[dim]  {escape(name)}:[/] {source.loss:.4f}, {source.bits_per_byte:.4f} bits per "
                f"byte ({source.tokens:,} tokens)",
                soft_wrap=True,
            )

    def on_skipped(self, event: "events.Skipped") -> None:
        first, behind = event.samples
        gradient = next(iter(event.worst_gradients), None)
        console.print(
            f"[yellow]step {event.step:,} skipped:[/] {escape(event.reason)} (samples {first:,} to "
            f"{behind - 1:,}" + (f"; largest gradient: {gradient})" if gradient else ")"),
            soft_wrap=True,
        )

    def on_rolled_back(self, event: "events.RolledBack") -> None:
        first, behind = event.samples
        console.print(
            f"[red]Rolled back from step {event.from_step:,} to {event.step:,}:[/] "
            f"{escape(event.reason)}. Samples {first:,} to {behind - 1:,} are skipped",
            soft_wrap=True,
        )

    def on_saved(self, event: "events.Saved") -> None:
        console.print(
            f"[dim]saved {escape(str(event.path))}: {size(event.bytes)}, training waited "
            f"{event.stall:.2f} s, written in {event.seconds:.1f} s[/]",
            soft_wrap=True,
        )

    def on_unsaved(self, event: "events.Unsaved") -> None:
        console.print(
            f"[bold red]step {event.step:,} is NOT saved:[/] {escape(event.reason)}. Training "
            "continues, and the next save tries again",
            soft_wrap=True,
        )

    def on_sample(self, event: "events.Sample") -> None:
        self._end_live()
        console.print(f"\n[dim]{escape(event.prompt)}[/]{escape(event.text)}\n", soft_wrap=True)

    def on_finished(self, event: "events.Finished") -> None:
        self._end_live()
        if self.sources:
            seen = ", ".join(f"{name} {amount(count)}" for name, count in self.sources.items())
            console.print(f"Tokens seen: {escape(seen)}", soft_wrap=True)
        run = escape(str(event.run))
        if event.reason == "stopped":
            saved = ", saved" if event.step else ""
            console.print(
                f"[yellow]Stopped at step {event.step:,} of {event.steps:,}{saved}.[/] "
                f"Continue with: pretrain train --resume {run}",
                soft_wrap=True,
            )
            return
        console.print(
            f"[green]Done:[/] {event.step:,} steps. Sample from it: pretrain sample {run}  ·  "
            f"more steps: pretrain train --resume {run} --steps {2 * event.steps}",
            soft_wrap=True,
        )

    def _remaining(self, event: "events.StepMetrics") -> float:
        left = (self.steps - event.step) * self.tokens_per_step
        return left / max(event.tokens_per_second, 1e-9)

    def _panel(self, event: "events.StepMetrics") -> RenderableType:
        done = Progress(TextColumn("{task.description}"), BarColumn(bar_width=40))
        done.add_task(
            f"step {event.step:,}/{self.steps:,}",
            total=self.steps,
            completed=event.step,
        )
        table = Table.grid(padding=(0, 3))
        cells = [
            ("loss", f"[bold]{event.loss:.4f}[/]"),
            ("learning rate", f"{event.learning_rate:.2e}"),
            ("gradient norm", f"{event.gradient_norm:.2f}"),
            ("tokens/s", f"{event.tokens_per_second:,.0f}"),
            ("MFU", f"{event.mfu:.1%}"),
            ("tokens", amount(event.tokens)),
            ("ETA", duration(self._remaining(event))),
            ("memory", _memory(event)),
            ("data wait", f"{event.data_wait * 1e3:.2f} ms"),
        ]
        if self.evaluation:
            cells.append(("validation loss", f"{self.evaluation.loss:.4f}"))
            cells.append(("bits per byte", f"{self.evaluation.bits_per_byte:.4f}"))
        half = (len(cells) + 1) // 2
        for row in (cells[:half], cells[half:]):
            table.add_row(*[f"[dim]{name}[/] {value}" for name, value in row])
        return Group(done, table)

    def _end_live(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None


def _memory(event: "events.StepMetrics") -> str:
    reserved = f" of {size(event.memory_reserved)} reserved" if event.memory_reserved else ""
    return size(event.memory) + reserved
