"""The start of a run: a resumed run reports its changes."""

from pretrain_cli.engine.runs.events import Notice
from tests.engine.training.test_resume import resume


def test_a_longer_schedule_is_reported_with_its_learning_rates(settings, run, tmp_path):
    """The rate falls linearly from 3e-3 to a tenth of it. Step 2 is first the end, then halfway."""
    line = {
        "optimizer__schedule": "linear",
        "optimizer__warmup_steps": 0,
        "optimizer__final_fraction": 0.1,
    }
    run(settings(train__steps=2, **line))
    told = [e.text for e in resume(run, tmp_path / "run", train__steps=4) if isinstance(e, Notice)]
    assert (
        "The linear schedule now ends at step 4: the learning rate goes on at 0.00165 instead of "
        "0.0003"
    ) in told
