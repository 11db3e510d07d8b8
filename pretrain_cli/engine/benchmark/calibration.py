"""The pace of a plan, by some real steps on the device that is here."""

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.results import Figures
from pretrain_cli.engine.benchmark.rounds import Rounds, Start
from pretrain_cli.engine.benchmark.workload import Arm, Repeats, Workload
from pretrain_cli.errors import PretrainError

REPEATS = Repeats(rounds=1, steps=5, warmup=2)


def calibrate(workload: Workload, asked: SpeedConfig, *, start: Start | None = None) -> Figures:
    """Rates and peak memory of the training step, in a process of its own."""
    rounds = Rounds([Arm(name=workload.name, workload=workload, speed=asked)], REPEATS, start=start)
    for _ in rounds.go():
        pass
    (result,) = rounds.results()
    if result.figures is None:
        raise PretrainError(f"--calibrate: the steps could not be timed: {result.reason}")
    return result.figures
