"""Speed settings change no loss beyond rounding; each is recorded as requested and as in force."""

import sys
import types
import typing

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch._functorch import config as autograd_config

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.runs.events import StepMetrics
from pretrain_cli.engine.runtime.speed import hides_keys, resolve_speed
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.presets import preset

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def choices(setting: str) -> list:
    """Return every value of a setting, read from its type, so that tests include new values."""

    def values(kind):
        if kind is bool:
            return [True, False]
        if typing.get_origin(kind) is typing.Literal:
            return list(typing.get_args(kind))
        return [value for part in typing.get_args(kind) for value in values(part)]

    return values(SpeedConfig.model_fields[setting].annotation)


EVERY = [(setting, value) for setting in SpeedConfig.model_fields for value in choices(setting)]


@pytest.fixture(scope="module")
def plain() -> dict[str, object]:
    """Return the baseline's losses and checkpoint, computed once for all tests."""
    return {}


@pytest.mark.parametrize(("setting", "value"), EVERY)
@pytest.mark.parametrize("model", ["gemma3-tiny", "qwen3-tiny"])
def test_a_speed_setting_changes_no_loss_and_no_checkpoint_key(
    settings, run, tmp_path, plain, model, setting, value
):
    if value in ("flex", "varlen", "fa3", "fa4", "liger", "cce"):
        pytest.skip("it trains on GPUs only")
    if value == "float8":
        pytest.skip("no CPU multiplies in it: test_training_in_float8.py has it emulated")
    if setting == "compile" and value is True:
        pytest.skip("compiling takes half a minute: test_compiled_blocks_learn_the_same does it")
    if setting == "cuda_graphs" and value is True:
        pytest.skip("NVIDIA GPUs only: test_cuda_graphs_have_the_same_losses does it")

    def five_steps(out, **speed):
        events = run(settings(out, model__name=model, train__steps=5, **speed))
        saved = load_file(tmp_path / out / "checkpoints/step-000005/model.safetensors")
        return [e.loss for e in events if isinstance(e, StepMetrics)], saved

    if model not in plain:
        plain[model] = five_steps("plain")
    expected, saved = plain[model]
    losses, weights = five_steps("other", **{f"speed__{setting}": value})
    bfloat16 = setting == "dtype" and value != "float32"
    assert losses == pytest.approx(expected, rel=5e-3 if bfloat16 else 1e-5)
    assert weights.keys() == saved.keys()
    for key in saved:
        assert weights[key].dtype == torch.float32
        assert weights[key].shape == saved[key].shape
    recorded = yaml.safe_load((tmp_path / "other/run.yaml").read_text())["speed"]
    assert recorded[setting]["asked"] == value
    if recorded[setting]["in_force"] != value:
        assert recorded[setting]["reason"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch.compile itself
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_blocks_learn_the_same(settings, run, masked):
    losses = []
    for on in (False, True):
        events = run(settings(f"run{on}", speed__compile=on, data__document_mask=masked))
        losses.append([e.loss for e in events if isinstance(e, StepMetrics)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_flex_is_refused_for_training_on_a_cpu_with_the_reason():
    with pytest.raises(ConfigError, match="no backward pass on a CPU; use auto"):
        resolve_speed(SpeedConfig(attention="flex"), CPU)
    assert resolve_speed(SpeedConfig(attention="flex"), CPU, training=False).attention == "flex"


def test_compile_is_off_without_a_compiler_and_gives_the_reason(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    decision = resolve_speed(SpeedConfig(compile=True), CPU).decisions["compile"]
    assert decision.in_force is False
    assert "no C++ compiler" in decision.reason


@pytest.mark.parametrize(
    ("environment", "installed", "missing"),
    [
        ({}, "gcc", ""),
        ({}, "clang", ""),
        ({}, "", "gcc or clang"),
        ({"CC": "icx"}, "icx", ""),
        ({"CC": "icx"}, "gcc", "icx"),  # Triton doesn't look further
    ],
)
def test_compile_on_a_gpu_needs_a_c_compiler(monkeypatch, environment, installed, missing):
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.delenv("CC", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("shutil.which", lambda name: name if name == installed else None)
    for asked in ("auto", True):
        speed = resolve_speed(SpeedConfig(attention="sdpa", compile=asked, dtype="float32"), GPU)
        decision = speed.decisions["compile"]
        assert decision.in_force is not bool(missing)
        said = f"Triton needs a C compiler, and finds no {missing}"
        assert not missing or decision.reason == said


UNCOMPILED = "PyTorch doesn't compile products of experts in float32"


@pytest.mark.parametrize(("device", "automatic"), [(CPU, False), (GPU, True)])
def test_experts_in_float32_are_not_compiled(monkeypatch, device, automatic):
    def resolved(compile_, dtype, model="qwen3-30b-a3b"):
        asked = SpeedConfig(attention="sdpa", compile=compile_, dtype=dtype)
        return resolve_speed(asked, device, model=preset(model)).decisions["compile"]

    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setattr("shutil.which", lambda name: name)  # a compiler is found
    off = resolved("auto", "float32")
    assert off.in_force is False
    assert (off.reason == UNCOMPILED) is automatic
    assert resolved(False, "float32").in_force is False
    with pytest.raises(ConfigError, match=f"speed.compile: true can't be used: {UNCOMPILED}"):
        resolved(True, "float32")
    for dtype, model in (("bfloat16", "qwen3-30b-a3b"), ("float32", "qwen3-0.6b")):
        assert resolved("auto", dtype, model).in_force is automatic
        assert resolved(True, dtype, model).in_force is True


def test_training_refuses_to_compile_experts_in_float32(settings, run, tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    asked = settings(
        model__name="qwen3-30b-a3b", model__num_hidden_layers=2, speed__dtype="float32",
        speed__compile=True, **{f"model__{name}": value for name, value in experts.items()},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=UNCOMPILED):
        run(asked)
    assert not (tmp_path / "run").exists()


def test_recompute_cheap_is_for_compiled_blocks_on_a_cpu(monkeypatch):
    def decided(asked, device=CPU, **more):
        asked = SpeedConfig(attention="sdpa", recompute_cheap=asked, **more)
        speed = resolve_speed(asked, device)
        return speed.decisions["recompute_cheap"]

    monkeypatch.setattr("shutil.which", lambda name: name)  # a compiler is found
    assert decided("auto", compile=True).in_force is True
    assert decided(False, compile=True).in_force is False
    for found in (decided(True), decided("auto")):
        assert (found.in_force, found.reason) == (False, "a setting of compiled blocks")
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    on_a_gpu = decided(True, GPU, compile=True)
    assert (on_a_gpu.in_force, "not tried on a GPU" in on_a_gpu.reason) == (False, True)


@pytest.mark.parametrize("recompute", [True, False])
def test_compiling_applies_recompute_cheap_to_functorch(tiny_model, recompute):
    banned = [f"ban_recompute_{n}" for n in ("materialized_backward", "used_far_apart",
                                             "long_fusible_chains")]  # fmt: skip
    with autograd_config.patch(dict.fromkeys(banned, recompute)):  # restored afterwards
        tiny_model().compile_parts(recompute_cheap=recompute)
        assert [getattr(autograd_config, name) for name in banned] == [not recompute] * 3


def test_cuda_graphs_are_refused_where_blocks_can_not_be_replayed(monkeypatch):
    def resolved(device=GPU, *, training=True, **more):
        asked = SpeedConfig(attention="sdpa", dtype="float32", cuda_graphs=True, **more)
        return resolve_speed(asked, device, training=training)

    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setattr("shutil.which", lambda name: name)  # a compiler is found
    assert resolved().cuda_graphs is True
    assert resolved(CPU, training=False).decisions["cuda_graphs"].reason == "a way to train"
    for said, arguments in {
        "CUDA graphs are for NVIDIA's GPUs": {"device": CPU, "compile": True},
        "compile is off": {"compile": False},
        "activation_checkpointing runs twice": {"activation_checkpointing": True},
    }.items():
        with pytest.raises(ConfigError, match=f"speed.cuda_graphs: true can't be used: .*{said}"):
            resolved(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_graphs_have_the_same_losses(settings, run, masked):
    """Two micro-steps a step: a replay must not overwrite the gradients of the first."""
    losses = []
    for on in (False, True):
        asked = settings(
            f"run-{on}", train__device="cuda", train__log_every=1, train__micro_batch_size=1,
            data__document_mask=masked, speed__compile=True, speed__cuda_graphs=on,
        )  # fmt: skip
        losses.append([e.loss for e in run(asked) if isinstance(e, StepMetrics)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_attention_backends_have_the_same_losses_on_a_gpu(settings, run, attention, masked):
    losses = []
    for name in ("eager", attention):
        speed = {"speed__attention": name, "speed__compile": False}
        common = {"train__device": "cuda", "train__log_every": 1, "data__document_mask": masked}
        events = run(settings(f"run-{name}", **common, **speed))
        losses.append([e.loss for e in events if isinstance(e, StepMetrics)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "seq_len", "documents", "hidden"),
    [
        ("gemma3-270m", 1024, False, True),  # its windows are 512
        ("gemma3-270m", 512, False, False),
        ("gemma3-270m", 512, True, True),
        ("qwen3-0.6b", 8192, False, False),
        ("qwen3-0.6b", 8192, True, True),
    ],
)
def test_short_windows_and_documents_hide_keys(name, seq_len, documents, hidden):
    assert hides_keys(preset(name), seq_len, documents=documents) is hidden
