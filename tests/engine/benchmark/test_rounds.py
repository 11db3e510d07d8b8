"""Rounds of arms: their order, failed arms, and the detection of arms that learn differently."""

import dataclasses
from concurrent.futures.process import BrokenProcessPool

import pytest

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark import timing
from pretrain_cli.engine.benchmark.rounds import Rounds
from pretrain_cli.engine.benchmark.timing import Round
from pretrain_cli.engine.benchmark.workload import Arm, Repeats, Workload
from pretrain_cli.engine.runtime.peak_flops import Peak
from pretrain_cli.engine.training import job
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.attention_backends.backends import BACKENDS
from pretrain_cli.model.config import variant
from pretrain_cli.model.presets import preset

MODEL = variant(
    preset("gemma3-tiny"),
    {
        "num_hidden_layers": 6,
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "vocab_size": 300,
    },
)
WORKLOAD = Workload(name="tiny", model=MODEL, seq_len=48, micro_batch_size=2, device="cpu")
IN_FORCE = {
    "dtype": {"asked": "float32", "in_force": "float32"},
    "float32_matmul": {"asked": "highest", "in_force": "highest"},
    "compile": {"asked": False, "in_force": False},
}


def here(name, speed, folder, *arguments):
    """Run a timing function in this process instead of a fresh one."""
    return getattr(timing, name)(*arguments)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.01)


def a_round(**changes):
    numbers = {
        "tokens": 96, "times": [0.1, 0.2, 0.3], "warmup": [0.9, 0.1], "losses": [6.0, 5.0, 4.0],
        "gradient_norms": [2.0, 1.9, 1.8], "peak_memory": 10**9, "warmup_peak_memory": 10**9,
        "speed": IN_FORCE,
    }  # fmt: skip
    return Round(**(numbers | changes))


def in_dtype(dtype):
    return IN_FORCE | {"dtype": {"asked": dtype, "in_force": dtype}}


def an_arm(name, **changes):
    return Arm(name=name, workload=WORKLOAD, speed=SpeedConfig(), **changes)


# --- order of arms -------------------------------------------------------------------------------


def test_arms_alternate_and_every_second_round_reverses_the_order():
    started = []

    def start(name, speed, folder, *arguments):
        started.append(arguments[0].name if name == "measure_round" else name)
        return a_round() if name == "measure_round" else Peak(1e10, "", 1e10)

    found = [an_arm("a"), an_arm("b"), an_arm("c", left_out="no effect")]
    rounds = Rounds(found, Repeats(rounds=2, steps=1, warmup=1), start=start)
    said = list(rounds.go())
    assert started == ["measure_peak", "a", "b", "measure_peak", "b", "a"]
    assert said[1] == "round 1 of 2: a"
    assert [result.kind for result in rounds.results()] == ["training step"] * 2 + ["not run"]
    assert [len(result.rounds) for result in rounds.results()] == [2, 2, 0]


def test_the_peak_is_measured_under_the_arms_process_settings():
    peaks = []

    def start(name, speed, folder, *arguments):
        if name == "measure_round":
            return a_round()
        peaks.append((speed, arguments))
        return Peak(1e10, "", 1e10)

    asked = SpeedConfig(dtype="float32", float32_matmul="high", expandable_segments=False)
    arm = Arm(name="a", workload=WORKLOAD, speed=asked)
    list(Rounds([arm], Repeats(rounds=1, steps=1, warmup=1), start=start).go())
    expected = SpeedConfig(dtype="float32", float32_matmul="high", expandable_segments=False)
    assert peaks == [(expected, ("cpu", expected))]


@pytest.mark.parametrize(
    ("error", "said", "is_bug"),
    [
        (BrokenProcessPool(), "its process was killed, perhaps because memory ran out", False),
        (ConfigError("speed.compile: no"), "speed.compile: no", False),
        (ValueError("two\nlines"), "ValueError: two", True),
    ],
)
def test_a_failed_arm_is_reported_and_the_other_arms_continue(error, said, is_bug):
    def start(name, speed, folder, *arguments):
        if name == "measure_round" and arguments[0].name == "a":
            raise error
        return a_round() if name == "measure_round" else Peak(1e10, "", 1e10)

    found = [an_arm("a"), an_arm("b", same_as="a", beside="a")]
    rounds = Rounds(found, Repeats(rounds=2, steps=1, warmup=1), start=start)
    list(rounds.go())
    failed, other = rounds.results()
    assert (failed.kind, failed.reason, failed.figures) == ("not run", said, None)
    assert other.figures is not None
    assert len(other.rounds) == 2
    assert bool(rounds.tracebacks) is is_bug


# --- detection of wrong results ------------------------------------------------------------------


def settings_of_both_types():
    """Return arms of the baseline, of sdpa in float32, and of sdpa in bfloat16."""
    found = []
    for name, attention, dtype in (
        ("baseline", "eager", "float32"),
        ("sdpa", "sdpa", "float32"),
        ("sdpa bf16", "sdpa", "bfloat16"),
    ):
        speed = SpeedConfig.model_validate(
            {"attention": attention, "dtype": dtype, "compile": False}
        )
        same_as = "baseline" if found else ""
        found.append(Arm(name=name, workload=WORKLOAD, speed=speed, same_as=same_as))
    return found


def differing():
    rounds = Rounds(settings_of_both_types(), Repeats(rounds=1, steps=5, warmup=2), start=here)
    list(rounds.go())
    assert not rounds.failures
    return {result.arm for result in rounds.results() if result.differs}


def test_correct_settings_give_no_differences():
    assert differing() == set()


@pytest.mark.parametrize("fault", ["half the scale", "half the window", "sees the future"])
def test_a_planted_attention_fault_is_caught_in_both_dtypes(monkeypatch, fault):
    right = BACKENDS["sdpa"]

    def lower(mask, device, dtype):
        if fault == "half the window" and mask.window is not None:
            mask = dataclasses.replace(mask, window=mask.window // 2)
        return False if fault == "sees the future" else right.lower(mask, device, dtype)

    def attend(q, k, v, mask, scale):
        return right.attend(q, k, v, mask, scale / 2 if fault == "half the scale" else scale)

    wrong = dataclasses.replace(right, lower=lower, attend=attend)
    monkeypatch.setitem(BACKENDS, "sdpa", wrong)
    assert differing() == {"sdpa", "sdpa bf16"}


def test_a_planted_optimizer_fault_is_caught(monkeypatch):
    build = job.build_optimizer

    def wrong(model, recipe, **options):
        optimizer = build(model, recipe, **options)
        if model.backend is BACKENDS["sdpa"]:
            for group in optimizer.param_groups:
                group["betas"] = (0.5, 0.95)
        return optimizer

    monkeypatch.setattr(job, "build_optimizer", wrong)
    assert differing() == {"sdpa", "sdpa bf16"}
