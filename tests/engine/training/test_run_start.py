"""The start of a run: what a resumed run changes is reported."""

from pretrain_cli.engine.runs.events import Notice
from tests.engine.training.test_resume import resume


def test_a_schedule_that_more_steps_stretch_is_told_with_its_rates(settings, run, tmp_path):
    """After warm-up, a line from 3e-3 down to a tenth: at its end, and halfway."""
    line = {"optimizer__schedule": "linear", "optimizer__warmup_steps": 0}
    run(settings(train__steps=2, **line))
    told = [e.text for e in resume(run, tmp_path / "run", train__steps=4) if isinstance(e, Notice)]
    assert (
        "The linear schedule now ends at step 4: the learning rate goes on at 0.00165 instead of "
        "0.0003"
    ) in told
