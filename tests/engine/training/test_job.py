"""Set-up: what is trained, what is tried by lr-find and what is timed are the same step."""

import dataclasses

import pytest
import torch

from pretrain_cli.engine.benchmark.timing import SameBatch
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.engine.planning.plan import StepPlan, make_plan
from pretrain_cli.engine.runs.events import StepMetrics
from pretrain_cli.engine.runs.retention import checkpoints
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.engine.training.job import set_up
from pretrain_cli.engine.training.prefetch import open_batches
from pretrain_cli.engine.training.step import train_step
from tests.engine.jobs import ALONE


@pytest.fixture
def plan_of(settings):
    """Return a function that makes the plan of the settings with these changes."""

    def make(out="run", **changes):
        return make_plan(settings(out, **changes), ALONE, lambda _: None, StopRequest())

    return make


def test_one_job_gives_the_losses_of_a_run_step_by_step(plan_of, settings, run):
    logged = [event for event in run(settings()) if isinstance(event, StepMetrics)]
    plan = plan_of("again")
    job = set_up(plan, ALONE, open_batches(plan, ALONE, lambda _: None))
    for event in logged:
        rates = plan.rates_at(event.step - 1)
        result = train_step(job, job.batches.next(), rates)
        assert result.loss.item() == event.loss
        assert result.gradient_norm.item() == event.gradient_norm
        assert rates.learning_rate == event.learning_rate
    job.batches.close()


def test_a_step_without_a_dataset_equals_the_step_of_a_run(plan_of):
    """`benchmark` has no dataset and plans only the step."""
    plan = plan_of()
    job = set_up(plan, ALONE, open_batches(plan, ALONE, lambda _: None))
    batch = job.batches.next()
    names = [field.name for field in dataclasses.fields(StepPlan)]
    timed = set_up(StepPlan(**{name: getattr(plan, name) for name in names}), ALONE,
                   SameBatch(batch))  # fmt: skip
    for _ in range(3):
        ours, theirs = (train_step(each, batch, StepRates(1e-3)) for each in (job, timed))
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.gradient_norm, theirs.gradient_norm)


def test_a_job_from_a_checkpoint_has_its_weights_state_and_position(plan_of, settings, run):
    run(settings(train__steps=4, train__checkpoint_every=2, train__keep_checkpoints=9))
    plan = plan_of("later", train__steps=4)
    batches = open_batches(plan, ALONE, lambda _: None)
    newest, older = checkpoints(settings().train.out)
    trained = set_up(plan, ALONE, open_batches(plan, ALONE, lambda _: None), start=newest)
    job = set_up(plan, ALONE, batches, start=older)
    assert (job.state.step, job.state.samples, batches.sample) == (2, 8, 8)
    for step in (2, 3):
        train_step(job, job.batches.next(), plan.rates_at(step))
    for ours, theirs in zip(job.decoder.parameters(), trained.decoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    batches.close()


def test_nothing_can_be_assigned_to_a_job(plan_of):
    plan = plan_of()
    job = set_up(plan, ALONE, open_batches(plan, ALONE, lambda _: None))
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.model = None
