"""Checkpoints of a run in progress: which states are saved, and what is recorded of the saves.

A state is saved at most once, only if weights and moments are finite, and marked as the best one if
its validation loss is the lowest. `AsyncSaver` copies and writes.
"""

import time
from dataclasses import replace

from pretrain_cli.engine.planning.plan import Plan
from pretrain_cli.engine.runs.checkpoint import State
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.engine.training.async_save import AsyncSaver
from pretrain_cli.engine.training.evaluate import Evaluator
from pretrain_cli.engine.training.job import Job
from pretrain_cli.engine.training.rollback import Rollback
from pretrain_cli.engine.training.run_log import RunLog
from pretrain_cli.errors import ConfigError


class Checkpointer:
    """Saves the states of a run in progress. Every rank must call its methods."""

    def __init__(
        self,
        job: Job[Plan],
        log: RunLog,
        stop: StopRequest,
        *,
        rollback: Rollback,
        evaluator: Evaluator,
    ) -> None:
        self.job, self.log, self.stop = job, log, stop
        self.rollback, self.evaluator = rollback, evaluator
        self.saver = AsyncSaver(log.run, job.plan, job.ranks, log.emit, log.sync)
        self.step = job.state.step
        """Step of the last save; the first one is the checkpoint that the run starts from."""

    def due(self, step: int) -> bool:
        """Return whether a save is due at this step. It always is at the last step."""
        return step == self.job.plan.steps or step % self.job.plan.checkpoint_every == 0

    def save(self, state: State, *, keeps_training: bool) -> State:
        """Copy the state and start writing it, after the previous save is written.

        Does nothing at a step that is saved already. If weights or moments are not finite, nothing
        is saved and `rollback.reason` is set. `keeps_training` is whether training continues.
        """
        if self.step == state.step:
            return state
        since = time.perf_counter()
        state = self.rollback.collect_outcomes(state)
        if not self.rollback.can_be_saved(state):
            return state
        state = self._with_best(state, self.saver.wait())
        self.log.flush()
        saved = replace(self.evaluator.mark_best(state), guard=self.job.guard.state_dict())
        self.saver.begin(
            self.job.decoder, self.job.optimizer, saved, since=since, keeps_training=keeps_training
        )
        self.step = state.step
        self.stop.paused()
        return self.poll(state)

    def poll(self, state: State) -> State:
        """Emit the events of a save that has ended, and return the state, updated with the best
        checkpoint."""
        return self._with_best(state, self.saver.poll())

    def wait(self) -> None:
        """Wait for the save in progress."""
        self.saver.wait()

    def rolled_back(self, state: State) -> None:
        """Record that the run is at the state of an earlier checkpoint."""
        self.step = state.step

    def leave(self, state: State, *, made: int) -> None:
        """Save a run that was asked to stop, after `made` steps of this process. Raises ConfigError
        if the time limit left none."""
        self.save(state, keeps_training=False)
        self.finish()
        if self.stop.reason:
            self.log.notify(f"{self.stop.reason}: stopped")
        if self.stop.out_of_time and not made:
            raise ConfigError(
                f"{self.stop.reason} is too short: no step was done before the last "
                f"{self.stop.room:.0f} s, which are kept for a save; give more"
            )

    def finish(self) -> None:
        """Wait for the last save. Raises PretrainError on every rank if it failed."""
        self.saver.finish()

    def close(self) -> None:
        """Wait for the background thread."""
        self.saver.close()

    def _with_best(self, state: State, saved: State | None) -> State:
        """Return the state, updated with the best checkpoint if a save has ended."""
        if saved is None:
            return state
        self.stop.saved(self.saver.seconds)
        return replace(state, best_step=saved.best_step, best_loss=saved.best_loss)
