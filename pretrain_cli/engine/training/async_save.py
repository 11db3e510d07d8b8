"""Asynchronous saves: copy the state of a run, then write the checkpoint while training continues.

    train ── copy ── train ── train ── train ── train ── copy ── train …
                └── room? write, hash, flush, rename, rotate ──┘

Training waits for the copy; on a GPU it queues its next step behind the copy. A second save waits
for the first. Stopping, finishing and rolling back also wait for a save in progress. The `Saved`
event is emitted, and the best checkpoint updated, once the files are complete. The first rank
copies, writes and rotates; the other ranks take part only to gather sharded tensors.

A failed save, for example on a full disk, does not end the run. It is retried once after removing
the checkpoints that rotation allows. If the retry fails, `Unsaved` is emitted and the next save
tries again. A run that would end without a checkpoint raises an error.

The copy takes as much host memory as the checkpoint has bytes: 12 a parameter with AdamW. On a CPU
with less memory left, training waits until the checkpoint is written. A GPU copies into pinned
memory, at the full speed of the bus, if twice the checkpoint's bytes are available at the first
save: torch rounds each tensor up to a power of two, and keeps the memory for the next save. With
less, or if the system refuses, it copies into pageable memory, tensor by tensor.
"""

import errno
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from pretrain_cli.config.setting_types import in_bytes
from pretrain_cli.engine.planning.plan import Plan
from pretrain_cli.engine.runs import checkpoint, retention
from pretrain_cli.engine.runs.checkpoint import Snapshot, State
from pretrain_cli.engine.runs.events import Emit, Event, Notice, Saved, Unsaved
from pretrain_cli.engine.runtime.distributed import Ranks, is_sharded
from pretrain_cli.engine.runtime.host_memory import available_memory
from pretrain_cli.engine.runtime.transfer import runs_behind
from pretrain_cli.errors import ConfigError, PretrainError
from pretrain_cli.files import free_space, is_disk_full
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.units import size as told

SECONDS_BETWEEN_POLLS = 1.0
"""Seconds between checks for the end of a save. Ranks exchange the result at each check, so that no
collective blocks long enough to time out."""


class AsyncSaver:
    """Writes the checkpoints of a run in a background thread, one at a time."""

    def __init__(
        self, run: Path, plan: Plan, ranks: Ranks, emit: Emit, sync: Callable[[], None]
    ) -> None:
        """Create a saver. `sync` flushes the metrics file to disk before a checkpoint
        counts on them; it raises OSError."""
        self.run, self.plan, self.ranks, self.emit, self.sync = run, plan, ranks, emit, sync
        self.size = checkpoint_size(plan)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self.writing: Future[list[Event]] | None = None
        self.state = State()
        """State of the save in progress, or of the last one."""
        self.failed: Unsaved | None = None
        """Event of the last save if it failed, else None."""
        self.seconds = 0.0
        """Seconds from the copy to the end of the last save."""
        self.waits_told = False
        self.pins: bool | None = None
        """True if a GPU copies into pinned memory; None before the first save."""

    def begin(
        self,
        model: Decoder,
        optimizer: Optimizer,
        state: State,
        *,
        since: float,
        keeps_training: bool,
    ) -> None:
        """Copy the current state and start writing it. Every rank must call this, after `wait`.

        `since` is when training began to wait for this save. `keeps_training` is false once
        training has ended: nothing changes any more, and no copy is needed.
        """
        self.began = time.perf_counter()
        copy = keeps_training and (is_sharded(model) or self._has_memory())
        if self.pins is None:
            self.pins = runs_behind(self.ranks.device) and self._has_room_to_pin()
        contents = checkpoint.take_snapshot(
            model,
            optimizer,
            state,
            tokenizer=self.plan.data.tokenizer,
            ranks=self.ranks,
            to_host=partial(self._to_host, copy=copy and not is_sharded(model)),
        )
        self.state, waits = state, keeps_training and not copy
        if contents is not None:
            self.writing = self.thread.submit(self._save, contents, since, waits=waits)
        if waits:
            self._join()

    def _has_memory(self) -> bool:
        """Return whether a copy fits in the memory of a CPU. GPU tensors are always copied."""
        if self.ranks.device.type != "cpu":
            return True
        free = available_memory() if self.ranks.is_first else None
        if not self.ranks.any(free is not None and free < self.size):
            return True
        if not self.waits_told:
            self.waits_told = True
            self.emit(
                Notice(
                    f"Training waits for every save: a copy of weights and moments would take "
                    f"{told(self.size)} of memory, and {told(free or 0)} are left"
                )
            )
        return False

    def _has_room_to_pin(self) -> bool:
        free, most = available_memory(), 2 * self.size
        if free is None or free >= most:
            return True
        self._tell_pageable(f"pinned would take up to {told(most)}, and {told(free)} are left")
        return False

    def _to_host(self, tensor: Tensor, *, copy: bool) -> Tensor:
        """Copy a tensor to the host; into pinned memory, the copy is only queued."""
        if self.pins:
            try:
                return tensor.to("cpu", non_blocking=True)  # torch pins its memory
            except RuntimeError as error:
                self.pins = False
                self._tell_pageable(f"pinned was refused: {str(error).splitlines()[0]}")
        return tensor.to("cpu", copy=copy)

    def _tell_pageable(self, reason: str) -> None:
        self.emit(Notice(f"Saves are copied through pageable memory, which is slower: {reason}"))

    # --- what became of it -----------------------------------------------------------------------

    def poll(self) -> State | None:
        """Emit the events of a save that has ended. Return the saved state, or None if no save has
        ended. Errors other than those of the disk are raised here."""
        if self.writing is None or not self.writing.done():
            return None
        events, self.writing = self.writing.result(), None
        self.failed = next((event for event in events if isinstance(event, Unsaved)), None)
        for event in events:
            self.emit(event)
        return None if self.failed else self.state

    def wait(self) -> State | None:
        """Wait for the save in progress, then poll. Every rank must call this."""
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
        """Wait for the last save. Raises PretrainError on every rank if it failed."""
        self.wait()
        if not self.ranks.any(self.failed is not None):
            return
        reason = self.failed.reason if self.failed else "the first rank could not write"
        found = retention.checkpoints(self.run)
        last = f"is step {retention.step_of(found[0]):,}" if found else "doesn't exist"
        raise PretrainError(
            f"step {self.state.step:,} is not saved: {reason}. The newest checkpoint of {self.run} "
            f"{last}. Fix that and resume: pretrain train --resume {self.run}"
        )

    def close(self) -> None:
        """Wait for the background thread."""
        self.thread.shutdown()

    # --- in the background -----------------------------------------------------------------------

    def _save(self, contents: Snapshot, since: float, *, waits: bool) -> list[Event]:
        """Write a checkpoint and rotate. Return the events to emit; errors of the disk are among
        them."""
        contents.wait()
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
        """Write the checkpoint. If the disk is full, make room and try once more."""
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
    """Return the bytes of a checkpoint of this run, which its copy in memory takes as well."""
    return checkpoint.size_on_disk(plan.model, plan.recipe.name, plan.data.tokenizer)


def check_space(plan: Plan, run: Path, ranks: Ranks, emit: Emit, *, done: int) -> None:
    """Raise ConfigError if the checkpoints of a run cannot fit on the disk; warn if they may not.

    The disk holds the kept checkpoints and the one being written. If that is too much, the oldest
    of the newest is removed first. At least one complete checkpoint always stays.
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
            f"{run}: {told(free)} are free, but {least - there} more checkpoints of "
            f"{told(size)} must fit; free some space, choose another disk with --out, or keep "
            "fewer with --keep"
        )
    if room < most * size:
        emit(
            Notice(
                f"Up to {most} checkpoints of {told(size)} are kept at a time, and {run} has room "
                f"for {room // size:.0f}: when it is full, older ones go before a new one is "
                "written, and a save that doesn't fit is left out"
            )
        )
