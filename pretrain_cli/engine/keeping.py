"""Which checkpoints a run has, which of them is meant, and which are kept."""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from pretrain_cli.engine.checkpoint import MODEL_FILES, damage
from pretrain_cli.errors import CheckpointError


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named for."""
    return int(folder.name.removeprefix("step-"))


def abandon_later(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints beyond this step, which a run that goes on from it leaves behind."""
    later = [folder for folder in checkpoints(run) if step_of(folder) > step]
    for folder in later:
        aside = folder.with_name(f"abandoned-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return later


def newest_intact(
    run: Path, skipped: Callable[[str], None], only: Collection[str] | None = None
) -> Path | None:
    """The newest checkpoint whose checksums pass; None where there is none at all.

    Raises CheckpointError where there are some and every one is damaged.
    """
    found = checkpoints(run)
    for folder in found:
        reason = damage(folder, only)
        if reason is None:
            return folder
        skipped(f"{reason}; skipped")
    if found:
        raise CheckpointError(f"{run}: none of its {len(found)} checkpoints passes its checksums")
    return None


def rotate(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for folder in checkpoints(run)[keep:]:
        shutil.rmtree(folder)


def find_model_folder(where: Path | None, skipped: Callable[[str], None]) -> Path:
    """A model folder from a run, a checkpoint or a Hugging Face folder; without any, from the
    newest run in runs/."""
    if where is None:
        runs = [path.parent for path in Path("runs").glob("*/run.yaml") if checkpoints(path.parent)]
        if not runs:
            raise CheckpointError(
                "runs/: no run with a checkpoint; train one with 'pretrain train', or name a folder"
            )
        where = max(runs, key=lambda run: checkpoints(run)[0].stat().st_mtime)
    if not where.exists():
        raise CheckpointError(f"{where}: no such run, checkpoint or model folder")
    if (where / "config.json").is_file():
        if (where / "training").is_dir() and (reason := damage(where, MODEL_FILES)):
            raise CheckpointError(f"{reason}; use another checkpoint")
        return where
    newest = newest_intact(where, skipped, MODEL_FILES)
    if newest is None:
        raise CheckpointError(
            f"{where}: neither a run with checkpoints nor a model folder (no config.json)"
        )
    return newest
