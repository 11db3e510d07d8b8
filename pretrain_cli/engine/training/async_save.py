"""Saving behind a run's back: a checkpoint's contents are copied, and written while it trains on.

    train ── copy ── train ── train ── train ── train ── copy ── train …
                └── room? write, hash, flush, rename, rotate ──┘

Training waits for the copy, and a second save for the first. So do a stop, the end of the run and a
way back. A checkpoint is said to be saved once it is, and which is the best is known from then on.
Copies, writing and rotation are the first rank's; the others join where tensors are parted.

A save that fails, on a full disk for one, doesn't end the run: what rotation allows is removed and
it is tried again; if that is of no use the run is told, and tries once more at its next save. A run
that would end unsaved ends with an error.

The copy takes as much of the host's memory as the checkpoint has bytes, 12 a parameter with AdamW.
Where a CPU has not as much left, training waits until all is written.
"""

import errno
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from torch.optim import Optimizer

from pretrain_cli.config.setting_types import in_bytes
from pretrain_cli.engine.planning.plan import Plan
from pretrain_cli.engine.runs import checkpoint, retention
from pretrain_cli.engine.runs.checkpoint import Snapshot, State
from pretrain_cli.engine.runs.events import Emit, Event, Notice, Saved, Unsaved
from pretrain_cli.engine.runtime.distributed import Ranks, is_sharded
from pretrain_cli.engine.runtime.host_memory import available_memory
from pretrain_cli.errors import ConfigError, PretrainError
from pretrain_cli.files import free_space, is_disk_full
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.units import size as told

SECONDS_BETWEEN_POLLS = 1.0
"""While a save is waited for, every rank looks again: none waits in one exchange for so long that
it is taken for dead."""


class AsyncSaver:
    """Writes a run's checkpoints, one at a time."""

    def __init__(
        self, run: Path, plan: Plan, ranks: Ranks, emit: Emit, sync: Callable[[], None]
    ) -> None:
        """`sync` brings onto the disk what a checkpoint counts on, or raises OSError."""
        self.run, self.plan, self.ranks, self.emit, self.sync = run, plan, ranks, emit, sync
        self.size = checkpoint_size(plan)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self.writing: Future[list[Event]] | None = None
        self.state = State()
        """State of the save in progress, or of the last one."""
        self.failed: Unsaved | None = None
        """The last save, where it failed."""
        self.seconds = 0.0
        """Seconds of the last save, from the copy to the end."""
        self.waits_told = False

    def begin(
        self, model: Decoder, optimizer: Optimizer, state: State, *, since: float, goes_on: bool
    ) -> None:
        """Save this instant, for which training waits `since` then. Every rank calls this, after
        `wait`. `goes_on` is false where nothing will change any more, and no copy is needed."""
        self.began = time.perf_counter()
        copy = goes_on and (is_sharded(model) or self._has_memory())
        contents = checkpoint.take_snapshot(
            model,
            optimizer,
            state,
            tokenizer=self.plan.data.tokenizer,
            ranks=self.ranks,
            copy=copy,
        )
        self.state, waits = state, goes_on and not copy
        if contents is not None:
            self.writing = self.thread.submit(self._save, contents, since, waits=waits)
        if waits:
            self._join()

    def _has_memory(self) -> bool:
        """Return whether a copy fits the memory of a CPU. A GPU's tensors are always copied."""
        if self.ranks.device.type != "cpu":
            return True
        free = available_memory() if self.ranks.is_first else None
        if not self.ranks.any(free is not None and free < self.size):
            return True
        if not self.waits_told:
            self.waits_told = True
            self.emit(
                Notice(
                    f"Saving keeps training waiting: a copy of weights and moments would take "
                    f"{told(self.size)} of memory, and {told(free or 0)} are left"
                )
            )
        return False

    # --- what became of it -----------------------------------------------------------------------

    def poll(self) -> State | None:
        """Emit a save that has ended since. -> the state that was saved; None where none was.
        What was a bug there is raised here."""
        if self.writing is None or not self.writing.done():
            return None
        events, self.writing = self.writing.result(), None
        self.failed = next((event for event in events if isinstance(event, Unsaved)), None)
        for event in events:
            self.emit(event)
        return None if self.failed else self.state

    def wait(self) -> State | None:
        """Look once no save is under way. Every rank calls this."""
        self._join()
        return self.poll()

    def _join(self) -> None:
        while self.ranks.any(self._is_busy()):
            pass

    def _is_busy(self) -> bool:
        """Return whether a save is still in progress, after a short wait."""
        if self.writing is None:
            return False
        return bool(wait([self.writing], timeout=SECONDS_BETWEEN_POLLS).not_done)

    def finish(self) -> None:
        """Wait for the last save. Raises PretrainError, on every rank, where it failed."""
        self.wait()
        if not self.ranks.any(self.failed is not None):
            return
        reason = self.failed.reason if self.failed else "the first rank could not write"
        found = retention.checkpoints(self.run)
        last = f"is step {retention.step_of(found[0]):,}" if found else "doesn't exist"
        raise PretrainError(
            f"step {self.state.step:,} is not saved: {reason}. The newest checkpoint of {self.run} "
            f"{last}. Mend that, and go on from there: pretrain train --resume {self.run}"
        )

    def close(self) -> None:
        """Wait for what is being written."""
        self.thread.shutdown()

    # --- in the background -----------------------------------------------------------------------

    def _save(self, contents: Snapshot, since: float, *, waits: bool) -> list[Event]:
        """Write a checkpoint and rotate. -> what there is to tell; errors of the disk among it."""
        begun, step = time.perf_counter(), contents.state.step
        events: list[Event] = []
        try:
            path = self._write(contents, events)
        except OSError as error:
            return [*events, Unsaved(step, time.time(), _reason(error))]
        finally:
            contents.weights.clear()  # before the next copy is made
            contents.moments.clear()
        try:
            retention.rotate(self.run, self.plan.settings.train)
        except OSError as error:
            events.append(Notice(f"Older checkpoints can't be removed: {_reason(error)}"))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        done = time.perf_counter()
        self.seconds = done - self.began
        stall = (done if waits else begun) - since
        return [*events, Saved(step, path, time.time(), stall, done - begun, size)]

    def _write(self, contents: Snapshot, events: list[Event]) -> Path:
        """Write it; where the disk is full, once more when room was made."""
        folder, train = self.run / "checkpoints", self.plan.settings.train
        try:
            return self._write_once(folder, contents)
        except OSError as error:
            if not is_disk_full(error):
                raise
            removed = retention.make_room(self.run, train)
            if not removed:
                raise
            names = ", ".join(path.name for path in removed)
            events.append(Notice(f"{_reason(error)}: removed {names} to make room"))
        return self._write_once(folder, contents)

    def _write_once(self, folder: Path, contents: Snapshot) -> Path:
        free = free_space(folder)
        if free < self.size:  # and not after most of it is written
            raise OSError(
                errno.ENOSPC, f"a checkpoint takes {told(self.size)}, and {told(free)} are free"
            )
        self.sync()
        limit = in_bytes(self.plan.settings.train.max_shard_size)
        return checkpoint.write_checkpoint(folder, contents, max_shard_size=limit)


def _reason(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{what} ({error.filename})" if error.filename else what


# --- before the run ------------------------------------------------------------------------------


def checkpoint_size(plan: Plan) -> int:
    """Bytes that a checkpoint of this run takes, and the copy that it is written from."""
    return checkpoint.size_on_disk(plan.model, plan.settings.optimizer.name, plan.data.tokenizer)


def check_space(plan: Plan, run: Path, ranks: Ranks, emit: Emit, *, done: int) -> None:
    """Refuse a run whose checkpoints can't fit the disk, and tell of one whose may not.

    At once there are those that are kept and the one that is being written. Where that is too much,
    the oldest of the newest is removed before; one that is whole always stays.
    """
    train, size, free = plan.settings.train, checkpoint_size(plan), free_space(run)
    there = len(retention.checkpoints(run))
    saves = there + math.ceil((plan.steps - done) / plan.checkpoint_every)
    every = plan.steps // train.keep_every if train.keep_every else 0
    least = min(saves, max(train.keep_checkpoints, 2))
    most = min(saves, train.keep_checkpoints + train.keep_best + every + 1)
    room = free + there * size
    if ranks.any(ranks.is_first and plan.steps > done and room < least * size):
        raise ConfigError(
            f"{run}: {told(free)} are free there, and {least - there} more checkpoints of "
            f"{told(size)} have to fit; make room, or choose another disk with --out or less to "
            "keep with --keep"
        )
    if room < most * size:
        emit(
            Notice(
                f"Up to {most} checkpoints of {told(size)} are kept at a time, and {run} has room "
                f"for {room // size:.0f}: when it is full, older ones go before a new one is "
                "written, and a save that doesn't fit is left out"
            )
        )
