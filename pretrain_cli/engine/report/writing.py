"""Write the report of runs: the page, and a picture if requested."""

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from pretrain_cli.engine.report.history import METRICS, History, check_run, read_history
from pretrain_cli.engine.report.page import render
from pretrain_cli.engine.runs.run_yaml import RUN_YAML
from pretrain_cli.errors import CheckpointError, ConfigError
from pretrain_cli.files import write_whole

RUNS = Path("runs")
PAGE = "report.html"


def write_report(
    folders: list[Path], out: Path | None, png: Path | None, notify: Callable[[str], None]
) -> list[Path]:
    """Write the report and return its files. Without folders, reports the newest run. Without
    `out`, the page goes to the run's folder, or for several runs to the current folder."""
    folders = folders or [newest_run()]
    for folder in folders:
        check_run(folder)
    page = out or (folders[0] / PAGE if len(folders) == 1 else Path(PAGE))
    _check_place("--out", page, (".html", ".htm"))
    if png is not None:
        _check_place("--png", png, (".png",))
        _need_matplotlib()
    histories = read_histories(folders)
    for history in histories:
        for note in history.notes:
            notify(f"{history.folder}: {note}")
    try:
        write_whole(page, render(histories))
    except OSError as error:
        raise ConfigError(
            f"--out: {page} can't be written ({error.strerror}); choose another place"
        ) from None
    if png is None:
        return [page]
    from pretrain_cli.engine.report.picture import draw

    try:
        draw(histories, png)
    except OSError as error:
        raise ConfigError(
            f"--png: {png} can't be written ({error.strerror}); choose another place"
        ) from None
    return [page, png]


def newest_run() -> Path:
    """Return the run in runs/ that last wrote metrics."""
    runs = [record.parent for record in RUNS.glob(f"*/{RUN_YAML}")]
    if not runs:
        raise CheckpointError(
            "runs/: no run; train one with 'pretrain train', or name the folder of one"
        )
    return max(runs, key=lambda run: max(_written(run / METRICS), _written(run / RUN_YAML)))


def _written(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def read_histories(folders: list[Path]) -> list[History]:
    """Read the runs, under distinct names."""
    counts = Counter(folder.resolve() for folder in folders)
    for folder in folders:
        if counts[folder.resolve()] > 1:
            raise ConfigError(f"{folder}: given twice; name each run once")
    histories = [read_history(folder) for folder in folders]
    names = Counter(history.name for history in histories)
    for history in histories:
        if names[history.name] > 1:
            history.name = str(history.folder)
    return histories


def _check_place(option: str, path: Path, endings: tuple[str, ...]) -> None:
    """Raise ConfigError for a path that is not a file of the right kind, or would overwrite another
    kind of file."""
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{option}: {path} doesn't end in {endings[0]}; choose a name that does")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is in no folder that exists ({path.parent})"
        raise ConfigError(f"{option}: {path} {what}; choose another place")


def _need_matplotlib() -> None:
    try:
        import_module("matplotlib")
    except ImportError:
        raise ConfigError(
            "--png: matplotlib is not installed; pip install 'pretrain[plot]', or leave --png out"
        ) from None
