"""Arms in turn, what they come to, and that one which learns something else is found out."""

import dataclasses
import math
from concurrent.futures.process import BrokenProcessPool

import pytest

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark import arms, timing
from pretrain_cli.engine.benchmark.results import ratios, summarize
from pretrain_cli.engine.benchmark.rounds import Rounds
from pretrain_cli.engine.benchmark.timing import Round
from pretrain_cli.engine.benchmark.workload import Arm, Repeats, Workload
from pretrain_cli.engine.runtime.peak_flops import Peak
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.attention_backends import BACKENDS
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
    """Run in this process what a fresh one would."""
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


# --- what rounds come to -------------------------------------------------------------------------


def test_figures_are_those_of_the_steps():
    peak = Peak(flops=1e10, source="measured", measured=1e10)
    rounds = {
        "a": [a_round(times=[0.1, 0.2, 0.3]), a_round(times=[0.4, 0.5], warmup=[9.0])],
        "b": [a_round(times=[0.4, 0.4, 0.4]), a_round(times=[0.9, 0.9])],
    }
    result = summarize(an_arm("a", same_as="b", beside="b"), rounds, peak)
    found = result.figures
    assert found.step_median == 0.3
    assert (found.step_fastest, found.step_slowest) == (0.1, 0.5)
    assert found.tokens_per_second == pytest.approx(96 / 0.3)
    assert found.warmup == 1.0
    assert found.compile_time == pytest.approx(1.0 - 2 * 0.3)
    assert found.worth == pytest.approx((0.4 / 0.2 + 0.9 / 0.45) / 2)
    # five windows of 8 in sequences of 48, one layer of all, 4 heads of 16; 6 N of the matrices
    seen = 5 * (8 * 9 / 2 + 40 * 8) / 48 + 49 / 2
    matrices = 6 * (64 * 16 * (2 * 4 + 2 * 1) + 3 * 64 * 96) + 300 * 64
    flops = 6 * matrices + 12 * 64 * seen
    assert result.flops_per_token == pytest.approx(flops)
    assert found.mfu == pytest.approx(flops * 96 / 0.3 / 1e10)
    conventional = 6 * matrices + 12 * 64 * 48 * 6
    assert found.mfu_conventional == pytest.approx(conventional * 96 / 0.3 / 1e10)
    assert (found.loss, found.loss_difference, result.differs) == (4.0, 0.0, "")


@pytest.mark.parametrize(
    ("dtype", "loss", "differs"),
    [
        ("float32", 4.0 * (1 + 5e-5), False),
        ("float32", 4.0 * (1 + 2e-4), True),
        ("float32", 4.0 * (1 - 2e-4), True),
        ("bfloat16", 4.0 * (1 + 5e-3), False),
        ("bfloat16", 4.0 * (1 + 2e-2), True),
        ("bfloat16", math.nan, True),
    ],
)
def test_what_rounding_explains_depends_on_the_type(dtype, loss, differs):
    rounds = {"a": [a_round(losses=[6.0, loss], speed=in_dtype(dtype))], "b": [a_round()]}
    result = summarize(an_arm("a", same_as="b"), rounds, Peak(1e10, "", 1e10))
    assert bool(result.differs) is differs
    if differs:
        assert "differs from b: loss" in result.differs
        assert dtype in result.differs


def test_a_first_gradient_that_is_another_is_a_difference():
    rounds = {"a": [a_round(gradient_norms=[2.1, 1.9])], "b": [a_round()]}
    result = summarize(an_arm("a", same_as="b"), rounds, Peak(1e10, "", 1e10))
    assert "first gradient norm 0.05 of its size" in result.differs


def test_a_ratio_is_taken_round_by_round_with_what_is_compiled_alike():
    compiled = IN_FORCE | {"compile": {"asked": True, "in_force": True}}
    process = {name: {"asked": False, "in_force": False} for name in arms.PROCESS_SETTINGS}
    rounds = {
        "ours": [a_round(times=[0.1], peak_memory=5, speed=IN_FORCE | compiled)] * 2,
        "plain": [a_round(times=[0.3])],
        "peer": [a_round(times=[t], peak_memory=10, speed=process | compiled) for t in (0.2, 0.4)],
    }
    found = [an_arm("ours"), an_arm("plain"), an_arm("peer", peer="transformers")]
    (ratio,) = ratios([summarize(arm, rounds, Peak(1e10, "", 1e10)) for arm in found])
    assert (ratio.arm, ratio.ours) == ("peer", "ours")
    assert ratio.tokens_per_second == pytest.approx(3.0)
    assert (ratio.lowest, ratio.highest) == pytest.approx((2.0, 4.0))
    assert ratio.peak_memory == 0.5


# --- in turn -------------------------------------------------------------------------------------


def test_arms_take_turns_and_every_other_round_goes_backwards():
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


@pytest.mark.parametrize(
    ("error", "said", "is_bug"),
    [
        (BrokenProcessPool(), "its process was killed, perhaps for want of memory", False),
        (ConfigError("speed.compile: no"), "speed.compile: no", False),
        (ValueError("two\nlines"), "ValueError: two", True),
    ],
)
def test_an_arm_that_fails_is_told_and_the_others_go_on(error, said, is_bug):
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


# --- the guard -----------------------------------------------------------------------------------


def settings_of_both_types():
    """The baseline, then sdpa in float32 and in bfloat16."""
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


def test_settings_as_they_are_learn_the_same():
    assert differing() == set()


@pytest.mark.parametrize("fault", ["half the scale", "half the window", "sees the future"])
def test_a_planted_fault_in_a_setting_is_caught_in_either_type(monkeypatch, fault):
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


def test_a_planted_fault_in_the_update_is_caught(monkeypatch):
    build = timing.build_optimizer

    def wrong(model, settings, *, fused):
        optimizer = build(model, settings, fused=fused)
        if model.backend is BACKENDS["sdpa"]:
            for group in optimizer.param_groups:
                group["betas"] = (0.5, 0.95)
        return optimizer

    monkeypatch.setattr(timing, "build_optimizer", wrong)
    assert differing() == {"sdpa", "sdpa bf16"}
