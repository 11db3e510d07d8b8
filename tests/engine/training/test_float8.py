"""Training in float8: when it is refused, and losses and checkpoints against bfloat16."""

import json
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.evaluation.evaluate_checkpoint import EvaluateRequest, evaluate_checkpoint
from pretrain_cli.engine.runs.events import StepMetrics
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.errors import ConfigError

GPU = torch.device("cuda", 0)
IN_FLOAT8 = SpeedConfig(dtype="float8")


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hopper")
def test_float8_is_in_force_on_hopper_with_torchao_and_compile():
    found = resolve_speed(IN_FLOAT8, GPU)
    assert found.record()["dtype"] == {"asked": "float8", "in_force": "float8"}
    assert found.compute_dtype == torch.bfloat16
    assert resolve_speed(SpeedConfig(), GPU).dtype == "bfloat16"  # float8 is never the default


def refusal(asked=IN_FLOAT8, device=GPU, **how):
    with pytest.raises(ConfigError) as error:
        resolve_speed(asked, device, **how)
    said = str(error.value)
    assert said.startswith("speed.dtype: 'float8' can't be used: ")
    assert said.endswith("; use bfloat16")
    return said.split(": ", 2)[2].removesuffix("; use bfloat16")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_float8_is_refused_on_cpu_and_mps(device):
    said = "it is for NVIDIA's GPUs, from compute capability 8.9 on"
    assert refusal(device=torch.device(device)) == said


@pytest.mark.usefixtures("hopper")
def test_float8_is_refused_on_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert refusal().startswith("it is for NVIDIA's GPUs")


@pytest.mark.usefixtures("hopper")
def test_float8_is_refused_on_an_older_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert refusal() == "it takes compute capability 8.9, and NVIDIA A100 has 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert resolve_speed(IN_FLOAT8, GPU).dtype == "float8"


@pytest.mark.usefixtures("hopper")
def test_float8_is_refused_without_torchao(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal() == "torchao is not installed (pip install 'pretrain[float8]')"


@pytest.mark.usefixtures("hopper")
def test_float8_is_refused_without_compile_or_triton(monkeypatch):
    asked = SpeedConfig(dtype="float8", compile=False)
    assert refusal(asked) == "it is made to be compiled, and compile is false"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert refusal() == "it is made to be compiled, and Triton is not installed"


@pytest.mark.usefixtures("hopper")
def test_float8_is_refused_outside_training():
    assert refusal(training=False) == "it is a way to train"


@pytest.mark.usefixtures("emulated_float8")
def test_float8_is_refused_for_sizes_that_16_does_not_divide(settings, run):
    asked = settings("odd", model__intermediate_size=50, speed__dtype="float8")
    with pytest.raises(ConfigError, match="intermediate_size is 50, and it takes multiples of 16"):
        run(asked)


# --- losses and checkpoints ----------------------------------------------------------------------


@pytest.mark.usefixtures("emulated_float8")
@pytest.mark.parametrize("model", ["gemma3-tiny", "qwen3-tiny"])
def test_float8_losses_are_near_bfloat16_and_checkpoints_alike(settings, run, tmp_path, model):
    losses, saved = {}, {}
    for dtype in ("bfloat16", "float8"):
        events = run(settings(dtype, model__name=model, speed__dtype=dtype))
        losses[dtype] = [e.loss for e in events if isinstance(e, StepMetrics)]
        checkpoint = tmp_path / dtype / "checkpoints/step-000006"
        saved[dtype] = load_file(checkpoint / "model.safetensors")
    assert losses["float8"] == pytest.approx(losses["bfloat16"], rel=1e-2)
    assert losses["float8"] != losses["bfloat16"]
    assert {name: (t.shape, t.dtype) for name, t in saved["float8"].items()} == {
        name: (t.shape, t.dtype) for name, t in saved["bfloat16"].items()
    }
    recorded = yaml.safe_load((tmp_path / "float8/run.yaml").read_text())["speed"]["dtype"]
    assert recorded == {"asked": "float8", "in_force": "float8"}


@pytest.mark.usefixtures("emulated_float8")
def test_validation_of_a_float8_run_computes_in_bfloat16(settings, run, tmp_path):
    run(settings("run", speed__dtype="float8"))
    rows = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    measured = [row for row in rows if row["kind"] == "evaluation"][-1]
    request = EvaluateRequest(where=tmp_path / "run", device="cpu")
    result = evaluate_checkpoint(request, lambda message: None)
    assert result.dtype == "bfloat16"
    assert result.evaluation.loss == pytest.approx(measured["loss"], rel=1e-6)
    request = EvaluateRequest(where=tmp_path / "run", dtype="float8")
    with pytest.raises(ConfigError, match="it is a way to train"):
        evaluate_checkpoint(request, lambda message: None)


@pytest.mark.gpu
@pytest.mark.usefixtures("float8_gpu")
@pytest.mark.parametrize("model", ["gemma3-tiny", "qwen3-tiny"])
def test_float8_losses_are_near_bfloat16_on_a_gpu(settings, run, model):
    losses = {}
    for dtype in ("bfloat16", "float8"):
        asked = settings(
            dtype, model__name=model, train__device="cuda", train__log_every=1, speed__dtype=dtype
        )
        losses[dtype] = [e.loss for e in run(asked) if isinstance(e, StepMetrics)]
    assert losses["float8"] == pytest.approx(losses["bfloat16"], rel=1e-2)
    assert losses["float8"] != losses["bfloat16"]
