"""What a resumed run changes of its settings, told."""

from collections.abc import Iterator

from pretrain_cli.config.build import check_config
from pretrain_cli.engine.optim.schedule import learning_rate
from pretrain_cli.engine.planning.plan import Plan, resolved
from pretrain_cli.engine.runs.run_yaml import RunRecord, differences


def changed_settings(record: RunRecord, plan: Plan, step: int) -> Iterator[str]:
    """A line for each setting that is another one now; and what more steps do to the schedule."""
    before = check_config(record.settings)
    for name, old, new in differences(before, resolved(plan)):
        yield f"{name}: {old} → {new}"
    steps = before.train.steps
    if not isinstance(steps, int) or steps == plan.steps:
        return
    rates = [
        learning_rate(
            step,
            peak=plan.learning_rate,
            steps=length,
            warmup_steps=plan.warmup_steps,
            settings=plan.settings.optimizer,
        )
        for length in (steps, plan.steps)
    ]
    if rates[0] != rates[1]:
        yield (
            f"The {plan.settings.optimizer.schedule} schedule now ends at step {plan.steps:,}: the "
            f"learning rate goes on at {rates[1]:.3g} instead of {rates[0]:.3g}"
        )
