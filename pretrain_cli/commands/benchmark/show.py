"""Show the results of `pretrain benchmark`, and write them to files."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pretrain_cli.commands.display import (
    check_output,
    console,
    error_console,
    notice,
    profile_table,
    remark,
    write_json,
)


@dataclass(frozen=True)
class OutputFiles:
    """Files requested on the command line."""

    json: Path | None
    markdown: Path | None
    plot: Path | None

    def check(self) -> None:
        """Raise ConfigError before measuring for files that cannot be written."""
        for name, path in vars(self).items():
            check_output(path, f"--{name}")
        if self.plot is not None:
            from pretrain_cli.engine.benchmark.render import need_matplotlib

            need_matplotlib(self.plot)

    def write(self, measured: Any, what: str, command: str) -> None:
        if not measured.arms:  # a search interrupted before its first arm
            return
        from pretrain_cli.engine.benchmark.record import record

        written = record(measured, what, command)
        if self.json is not None:
            write_json(self.json, written)
        if self.markdown is not None:
            from pretrain_cli.engine.benchmark.render import to_markdown

            self.markdown.write_text(to_markdown(written))
            console.print(f"Written to {escape(str(self.markdown))}", soft_wrap=True)
        if self.plot is not None:
            from pretrain_cli.engine.benchmark.render import draw

            draw(written, self.plot)
            console.print(f"Written to {escape(str(self.plot))}", soft_wrap=True)


def say_workload(workload: Any, repeats: Any, *, is_swept: bool) -> None:
    import torch

    from pretrain_cli.engine.runtime.distributed import device_name
    from pretrain_cli.model.counting import count_parameters

    console.print(
        f"{'Varied: ' if is_swept else ''}"
        f"[bold]{escape(workload.name)}[/] {count_parameters(workload.model).total:,} parameters, "
        f"{workload.micro_batch_size} × {workload.seq_len} tokens a step, "
        f"{device_name(torch.device(workload.device))}, torch {torch.__version__}\n"
        f"{repeats.rounds} × ({repeats.warmup} + {repeats.steps}) steps, the first of each to warm "
        "up",
        soft_wrap=True,
    )


def watch(measured: Any, interruption: Any) -> None:
    """Measure, updating the table on a terminal, then print the results, also if a signal ends it
    early."""
    try:
        with interruption.can_be_given_up():
            _measure(measured)
    except KeyboardInterrupt:
        measured.cut(interruption.signal.name)
        notice(f"{measured.cut_short}: ended early; these are the results so far")
    from pretrain_cli.engine.benchmark.render import LEGEND, peaks, remarks
    from pretrain_cli.engine.benchmark.results import ratios

    results = measured.results()
    console.print(_table(measured))
    console.print(
        f"[dim]{escape(LEGEND)}[/]\n"
        + escape(peaks({"peaks": {name: asdict(peak) for name, peak in measured.peaks.items()}})),
        soft_wrap=True,
    )
    for ratio in ratios(results):
        console.print(
            f"{escape(ratio.ours)} / {escape(ratio.arm)}: [bold]{ratio.tokens_per_second:.2f} ×[/] "
            f"tokens/s ({ratio.lowest:.2f} – {ratio.highest:.2f}), "
            f"[bold]{ratio.peak_memory:.2f} ×[/] memory",
            soft_wrap=True,
        )
    for said in remarks([asdict(result) for result in results]):
        notice(said)
    for text in measured.tracebacks:
        error_console.print(text, markup=False, soft_wrap=True)


def _measure(measured: Any) -> None:
    if not console.is_terminal:
        for coming in measured.go():
            remark(coming)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        for coming in measured.go():
            live.update(Group(_table(measured), Text(f"{coming} …", style="dim")))


def _table(measured: Any) -> Table:
    from pretrain_cli.engine.benchmark.render import COLUMNS, rows

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(COLUMNS[0], no_wrap=True)
    for heading in COLUMNS[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    group = ""
    for row in rows([asdict(result) for result in measured.results()]):
        if row.group != group:
            group = row.group
            table.add_section()
        style = "red" if row.differs else "" if row.is_run else "dim"
        table.add_row(*map(escape, row.cells), style=style)
    return table


def show_profiles(measured: Any, folder: Path, interruption: Any) -> None:
    """Profile each arm in turn."""
    for arm in measured.arms:
        if arm.left_out or arm.name in measured.failures:
            continue
        with interruption.can_be_given_up(), console.status(f"{arm.name}: profile"):
            found = measured.profile(arm, folder / f"{arm.name}.json")
        console.print(profile_table(arm.name, found))


def show_comparison(first: Path, second: Path) -> None:
    """Print the second record divided by the first, and differences in what was measured."""
    from pretrain_cli.engine.benchmark.record import compare, read

    found = compare(read(first), read(second))
    table = Table(box=SIMPLE_HEAD, title=f"{escape(str(second))} / {escape(str(first))}")
    table.add_column("")
    for heading in ("tokens/s", "memory", "loss"):
        table.add_column(heading, justify="right")
    for row in found.arms:
        table.add_row(
            escape(row.arm),
            f"{row.tokens_per_second:.2f} ×",
            f"{row.peak_memory:.2f} ×",
            "{:.4f} → {:.4f}".format(*row.loss),
        )
    console.print(table)
    for difference in found.differences:
        notice(difference)
    if found.unmatched:
        notice(f"Without figures in both: {', '.join(found.unmatched)}")
