"""Float8 in a benchmark: its loss difference, and its arms in an ablation."""

import dataclasses

import pytest
import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark import arms, timing
from pretrain_cli.engine.benchmark.rounds import Rounds
from pretrain_cli.engine.benchmark.workload import Arm, Repeats, Workload
from pretrain_cli.model import float8
from pretrain_cli.model.config import variant
from pretrain_cli.model.presets import preset


def a_workload(name="gemma3-tiny", device="cpu"):
    changes = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    model = variant(preset(name), changes | {"vocab_size": 300})
    return Workload(name=name, model=model, seq_len=48, micro_batch_size=2, device=device)


@pytest.fixture
def measured(monkeypatch):
    """Return a function that measures float32, bfloat16 and float8 arms in this process."""
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.01)

    def measure(name="gemma3-tiny"):
        found = []
        for dtype in ("float32", "bfloat16", "float8"):
            asked = SpeedConfig.model_validate({"attention": "eager", "dtype": dtype})
            same_as = found[0].name if found else ""
            arm = Arm(name=dtype, workload=a_workload(name), speed=asked, same_as=same_as)
            found.append(arm)
        rounds = Rounds(
            found,
            Repeats(rounds=1, steps=5, warmup=2),
            start=lambda name, speed, folder, *arguments: getattr(timing, name)(*arguments),
        )
        list(rounds.go())
        assert not rounds.failures
        return {result.arm: result for result in rounds.results()}, rounds

    return measure


@pytest.mark.usefixtures("emulated_float8")
@pytest.mark.parametrize("model", ["gemma3-tiny", "qwen3-tiny"])
def test_float8_loss_differs_more_than_bfloat16_but_within_tolerance(measured, model):
    found, rounds = measured(model)
    assert found["float8"].differs == ""
    off = {name: found[name].figures.loss_difference for name in ("bfloat16", "float8")}
    assert 0 < off["bfloat16"] < off["float8"] < 5e-2
    # no float8 peak: much of a step runs in bfloat16, and MFU is a share of bfloat16's peak
    assert set(rounds.peaks) == {"float32", "bfloat16"}
    assert found["float8"].peak_flops == rounds.peaks["bfloat16"].flops
    assert "MFU is a share of bfloat16's peak" in found["float8"].notes


@pytest.mark.usefixtures("emulated_float8")
@pytest.mark.parametrize("model", ["gemma3-tiny", "qwen3-tiny"])
@pytest.mark.parametrize("fault", ["no gradient of the input", "its gradient twice"])
def test_a_wrong_float8_product_is_reported_as_a_difference(measured, monkeypatch, model, fault):
    right = float8.float8_product()

    def wrong(x, weight):
        if fault == "no gradient of the input":
            return right(x.detach(), weight)
        x = x.view_as(x)
        x.register_hook(lambda gradient: 2 * gradient)
        return right(x, weight)

    monkeypatch.setattr(float8, "float8_product", lambda: wrong)
    found, _ = measured(model)
    assert "of its size off, and float8 explains " in found["float8"].differs
    assert found["bfloat16"].differs == ""


@pytest.mark.usefixtures("hopper")
def test_an_ablation_adds_a_float8_arm_to_all_on_in_bfloat16(monkeypatch):
    def arms_of(asked):
        return {arm.name: arm for arm in arms.ablation(a_workload(device="cuda:0"), asked)}

    found = arms_of(SpeedConfig(compile=True))
    assert "it is made to be compiled" in found["+ dtype float8"].left_out  # baseline: not compiled
    arm = found["dtype float8"]
    assert (arm.group, arm.beside, arm.same_as) == ("all on but", "all on", "baseline")
    assert (arm.left_out, arm.speed.dtype, arm.speed.compile) == ("", "float8", True)

    found = arms_of(SpeedConfig(compile=True, dtype="float8"))
    assert found["all on"].speed.dtype == "float8"
    assert found["dtype bfloat16"].speed.dtype == "bfloat16"
    assert found["− dtype"].speed.dtype == "float32"
    assert "compile is false" in found["− compile"].left_out

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    found = arms_of(SpeedConfig(compile=True))
    assert "NVIDIA H200 has 8.0" in found["+ dtype float8"].left_out
    assert "dtype float8" not in found


def test_an_ablation_on_a_cpu_reports_why_it_has_no_float8_arm():
    found = {arm.name: arm for arm in arms.ablation(a_workload(), SpeedConfig(dtype="bfloat16"))}
    assert "it is for NVIDIA's GPUs" in found["+ dtype float8"].left_out
    assert "dtype float8" not in found


@pytest.mark.usefixtures("hopper")
def test_an_ablation_reports_matrix_sizes_that_float8_cannot_use():
    workload = a_workload(device="cuda:0")
    odd = dataclasses.replace(workload, model=variant(workload.model, {"hidden_size": 72}))
    found = {arm.name: arm for arm in arms.ablation(odd, SpeedConfig(compile=True))}
    assert "hidden_size is 72" in found["+ dtype float8"].left_out
    assert "dtype float8" not in found


@pytest.mark.gpu
@pytest.mark.usefixtures("float8_gpu")
@pytest.mark.parametrize("name", ["gemma3-tiny", "qwen3-tiny"])
def test_float8_loss_is_within_tolerance_on_a_gpu(name):
    """Measure compiled arms in fresh processes, as `pretrain benchmark --ablate` does."""
    wanted = {"baseline", "all on", "dtype float8"}
    found = arms.ablation(a_workload(name, "cuda:0"), SpeedConfig(compile=True, dtype="bfloat16"))
    rounds = Rounds(
        [arm for arm in found if arm.name in wanted], Repeats(rounds=1, steps=5, warmup=2)
    )
    list(rounds.go())
    assert not rounds.failures
    results = {result.arm: result for result in rounds.results()}
    assert set(results) == wanted
    assert results["dtype float8"].differs == ""
    assert results["dtype float8"].figures.loss_difference > 0
