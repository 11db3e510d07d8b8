"""Estimates of a run against arithmetic by hand, and `auto` on a GPU that is not present."""

import subprocess
import sys
import types

import pytest
import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.planning.run_estimate import GPU_SETTINGS, find_machine, forecast
from pretrain_cli.engine.runtime.gpu_specs import STATED, called
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.presets import preset


def test_auto_values_for_a_listed_gpu_match_training_on_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setattr("shutil.which", lambda name: name)  # a C compiler is found
    found = resolve_speed(SpeedConfig(), torch.device("cuda", 0))
    assert {name: getattr(found, name) for name in GPU_SETTINGS} == GPU_SETTINGS


@pytest.mark.parametrize(
    ("typed", "name"),
    [("h200", "H200"), ("H100-PCIe", "H100 PCIe"), ("rtx_4090", "RTX 4090"), ("cpu", None)],
)
def test_gpu_names_match_in_any_case_and_with_any_separator(typed, name):
    assert called(typed) == name


def test_every_listed_gpu_can_be_planned_for():
    for name, stated in STATED.items():
        machine = find_machine(name.lower().replace(" ", "-"), 1, SpeedConfig())
        assert (machine.name, machine.peak_flops) == (name, stated.flops)
        assert machine.memory == pytest.approx(0.9 * (stated.memory - 0.5e9))


def test_a_plan_for_an_absent_gpu_resolves_given_settings():
    asked = SpeedConfig(dtype="float32", compile=False, attention="eager")
    speed = find_machine("h200", 1, asked).speed
    assert (speed["dtype"], speed["compile"], speed["attention"]) == ("float32", False, "eager")
    on_a_cpu = SpeedConfig(recompute_cheap=True, keep_freed_memory=True)
    speed = find_machine("h200", 1, on_a_cpu).speed
    assert (speed["recompute_cheap"], speed["keep_freed_memory"]) == (False, False)


@pytest.mark.parametrize("device", ["h200", "cpu"])
def test_experts_in_float32_are_planned_as_training_takes_them(device):
    def compiled(compile_, dtype, model):
        asked = SpeedConfig(dtype=dtype, compile=compile_)
        return find_machine(device, 1, asked, preset(model)).speed["compile"]

    on_gpu = device == "h200"
    assert compiled("auto", "float32", "qwen3-30b-a3b") is False
    assert compiled("auto", "bfloat16", "qwen3-30b-a3b") is on_gpu
    assert compiled("auto", "float32", "qwen3-0.6b") is on_gpu
    with pytest.raises(ConfigError, match="doesn't compile products of experts in float32"):
        compiled(True, "float32", "qwen3-30b-a3b")


def test_float8_is_planned_as_bfloat16_and_refused_as_in_training():
    for_both = [find_machine("h200", 1, SpeedConfig(dtype=d)) for d in ("float8", "bfloat16")]
    assert for_both[0].speed["dtype"] == "float8"
    found = [forecast("qwen3-0.6b", preset("qwen3"), 1024, machine) for machine in for_both]
    assert found[0].ways == found[1].ways
    assert found[0].pace == found[1].pace
    with pytest.raises(ConfigError, match="can't be used: A100 doesn't multiply in it"):
        find_machine("a100", 1, SpeedConfig(dtype="float8"))
    with pytest.raises(ConfigError, match="it is made to be compiled, and compile is false"):
        find_machine("h200", 1, SpeedConfig(dtype="float8", compile=False))


def test_time_memory_and_disk_of_a_run_on_eight_gpus():
    """Estimate Gemma 3 270M on 5 billion tokens, 1.698 GFLOP each, in samples of 1024."""
    machine = find_machine("h200", 8, SpeedConfig())
    found = forecast("gemma3-270m", preset("gemma3"), 1024, machine, tokens=5 * 10**9)
    assert found.pace.tokens_per_second == pytest.approx(0.4 * 8 * 989e12 / 1.698e9, rel=1e-3)
    assert found.seconds == pytest.approx(5e9 * 1.698e9 / (0.4 * 8 * 989e12), rel=1e-3)
    parameters = 268_098_176
    assert found.checkpoint == 12 * parameters
    assert found.checkpoints == 4 * 12 * parameters  # newest two, best, one being written
    copy, part = found.ways["ddp"].memory, found.ways["fsdp"].memory
    assert (copy.most("weights"), part.most("weights")) == (4 * parameters, parameters // 2)
    assert (copy.most("optimizer"), part.most("optimizer")) == (8 * parameters, parameters)
    # 4,096 tokens at a time, which divides 224 samples, in bfloat16; no float32 beside them
    of_224 = forecast("gemma3-270m", preset("gemma3"), 1024, machine, micro_batch_size=224)
    assert of_224.ways["ddp"].memory.most("logits") == 2 * 4096 * 262_144
    written = found.record()
    assert written["ways"]["ddp"]["memory"]["peak"] == copy.peak <= machine.memory
    assert written["seconds"] == found.seconds


def test_the_micro_batch_is_the_largest_that_fits():
    machine = find_machine("h100", 1, SpeedConfig())
    config = preset("qwen3-0.6b")
    way = forecast("", config, 2048, machine).ways["alone"]
    assert way.fits
    more = forecast("", config, 2048, machine, micro_batch_size=way.micro_batch_size + 1)
    assert not more.ways["alone"].fits


def test_a_plan_reports_that_a_model_does_not_fit():
    """Estimate the 8B, whose weights, gradients and moments take 131 GB."""
    way = forecast("", preset("qwen3-8b"), 1024, find_machine("h100", 1, SpeedConfig()))
    assert not way.ways["alone"].fits
    assert way.ways["alone"].memory.peak > 131e9
    parted = forecast("", preset("qwen3-8b"), 1024, find_machine("h100", 8, SpeedConfig()))
    assert not parted.ways["ddp"].fits
    assert parted.ways["fsdp"].fits


def test_a_machine_without_a_stated_peak_gets_no_pace():
    machine = find_machine("cpu", 1, SpeedConfig())
    found = forecast("", preset("gemma3-tiny"), 64, machine)
    assert found.pace is None
    assert found.seconds is None
    assert found.tokens == 20 * found.parameters


def test_a_gpu_count_for_a_cpu_is_refused():
    with pytest.raises(ConfigError, match="--gpus: 2 of a machine without any"):
        find_machine("cpu", 2, SpeedConfig())


def test_a_plan_for_a_listed_gpu_does_not_load_torch():
    """Make the plan in a fresh process, which must not load torch."""
    program = (
        "import sys; from pretrain_cli.commands.count_params_plan import Asked, show_plan; "
        "from pretrain_cli.model.presets import preset; "
        "asked = Asked('5B', 'h200', 8, None, None, None, None, False); "
        "show_plan('gemma3', preset('gemma3'), 1024, asked, as_json=False); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "activations" in done.stdout
