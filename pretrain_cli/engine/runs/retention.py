"""Find a run's checkpoints and decide which to keep.

A checkpoint is removed by renaming it first, as it was written, so a folder named step-… is always
complete. A run that is killed while writing or removing leaves a folder whose name begins with a
dot; the next process deletes it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from pretrain_cli.config.run_config import TrainSettings
from pretrain_cli.engine.runs.checkpoint import State, find_damage, read_state
from pretrain_cli.errors import CheckpointError, ConfigError


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's folder name."""
    return int(folder.name.removeprefix("step-"))


# --- choosing a checkpoint -----------------------------------------------------------------------


def newest_intact(
    run: Path,
    skipped: Callable[[str], None],
    *,
    model_only: bool = False,
    finite: bool = False,
) -> Path | None:
    """Return the newest checkpoint whose checksums match; None if the run has no checkpoints.

    `model_only` does not read the files that only training needs. `finite` skips checkpoints saved
    after a loss, or with weights, that were not finite. Raises CheckpointError if all checkpoints
    are damaged.
    """
    found = checkpoints(run)
    reasons = 0
    for folder in found:
        reason = find_damage(folder, model_only=model_only)
        if reason is not None:
            reasons += 1
            skipped(f"{reason}; skipped")
        elif not finite or read_state(folder).finite:
            return folder
    if found and reasons == len(found):
        raise CheckpointError(f"{run}: none of its {len(found)} checkpoints passes its checksums")
    return None


def best_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint with the lowest validation loss among those that were evaluated."""
    states = {step_of(folder): _state(folder) for folder in checkpoints(run)}
    newest = next((state for state in states.values() if state), None)
    if newest is None or newest.best_step not in states:
        return None
    return next(folder for folder in checkpoints(run) if step_of(folder) == newest.best_step)


def find_model_folder(
    where: Path | None, skipped: Callable[[str], None], *, best: bool = False
) -> Path:
    """Return the model folder of a run, a checkpoint or a Hugging Face folder; None means the
    newest run in runs/. Of a run it is the newest checkpoint, or with `best` the one with the
    lowest validation loss."""
    if where is None:
        runs = [path.parent for path in Path("runs").glob("*/run.yaml") if checkpoints(path.parent)]
        if not runs:
            raise CheckpointError(
                "runs/: no run with a checkpoint; train one with 'pretrain train', or name a folder"
            )
        where = max(runs, key=lambda run: checkpoints(run)[0].stat().st_mtime)
    if not where.exists():
        raise CheckpointError(f"{where}: no such run, checkpoint or model folder")
    if best:
        where = _best(where)
    if (where / "config.json").is_file():
        if (where / "training").is_dir() and (reason := find_damage(where, model_only=True)):
            raise CheckpointError(f"{reason}; use another checkpoint")
        return where
    newest = newest_intact(where, skipped, model_only=True)
    if newest is None:
        raise CheckpointError(
            f"{where}: neither a run with checkpoints nor a model folder (no config.json)"
        )
    return newest


def _best(run: Path) -> Path:
    if (run / "config.json").is_file():
        raise ConfigError(f"--best: {run} is one model folder; give a run, or leave --best out")
    best = best_checkpoint(run)
    if best is None:
        raise CheckpointError(
            f"{run}: none of its checkpoints has a validation loss; leave --best out"
        )
    return best


# --- removing checkpoints ------------------------------------------------------------------------


def rotate(run: Path, train: TrainSettings) -> list[Path]:
    """Remove the checkpoints not to be kept, and return them. Kept are the newest ones, the best by
    validation loss, one every `keep_every` steps, and the last known to be finite."""
    found = checkpoints(run)
    return _remove_all_but(_kept(found, train, train.keep_checkpoints), found)


def make_room(run: Path, train: TrainSettings) -> list[Path]:
    """Remove, before a save, the checkpoints that rotation would remove after it.

    First reads completely the checkpoint to resume from if the save fails: it stays, and is intact
    and finite.
    """
    found = checkpoints(run)
    kept = _kept(found, train, train.keep_checkpoints - 1)
    for folder in found:
        if find_damage(folder) is None and read_state(folder).finite:
            return _remove_all_but(kept | {folder}, found)
    return []


def abandon_later(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints after this step, for a run that resumes from it."""
    later = [folder for folder in checkpoints(run) if step_of(folder) > step]
    for folder in later:
        abandoned = folder.with_name(f"abandoned-{folder.name}")
        shutil.rmtree(abandoned, ignore_errors=True)
        folder.rename(abandoned)
    return later


def sweep(run: Path) -> None:
    """Delete folders that a killed process left while writing or removing."""
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint: at any instant it is complete, or gone."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _kept(found: list[Path], train: TrainSettings, newest: int) -> set[Path]:
    """Return the checkpoints to keep, from a list that is newest first."""
    states = {folder: _state(folder) for folder in found}
    kept = set(found[:newest])
    kept |= set([folder for folder, state in states.items() if state and state.finite][:1])
    if train.keep_every is not None:
        kept |= {folder for folder in found if step_of(folder) % train.keep_every == 0}
    if train.keep_best:
        best = next((state.best_step for state in states.values() if state), None)
        kept |= {folder for folder in found if step_of(folder) == best}
    return kept


def _remove_all_but(kept: set[Path], found: list[Path]) -> list[Path]:
    beyond = [folder for folder in found if folder not in kept]
    for folder in beyond:
        remove(folder)
    return beyond


def _state(folder: Path) -> State | None:
    try:
        return read_state(folder)
    except CheckpointError:
        return None
