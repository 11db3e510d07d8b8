"""Arms of an ablation, a sweep and a comparison: names and settings."""

import dataclasses

import pytest

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark import arms
from pretrain_cli.engine.benchmark.rounds import Rounds
from pretrain_cli.engine.benchmark.workload import Repeats, Workload
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.config import FULL, SLIDING
from pretrain_cli.model.presets import full_name, preset


@pytest.fixture
def workload():
    return Workload(
        name="gemma3-tiny",
        model=preset("gemma3-tiny"),
        seq_len=64,
        micro_batch_size=2,
        device="cpu",
    )


def find(name):
    return full_name(name), preset(name)


def by_name(found):
    assert len({arm.name for arm in found}) == len(found)
    return {arm.name: arm for arm in found}


# --- ablation ------------------------------------------------------------------------------------


def test_the_baseline_has_the_plain_value_of_every_setting(workload):
    baseline = by_name(arms.ablation(workload, SpeedConfig()))["baseline"].speed.model_dump()
    assert baseline["attention"] == "eager"
    assert baseline["dtype"] == "float32"
    assert baseline["float32_matmul"] == "highest"
    assert set(baseline.values()) == {"eager", "fa2", "float32", "highest", False}


def test_an_ablation_turns_on_each_value_of_each_setting_alone(workload):
    found = by_name(arms.ablation(workload, SpeedConfig()))
    baseline = found["baseline"].speed.model_dump()
    alone = [arm for arm in found.values() if arm.group == "alone on"]
    changes = []
    for arm in alone:
        changed = {n: v for n, v in arm.speed.model_dump().items() if v != baseline[n]}
        assert len(changed) == 1
        assert (arm.same_as, arm.beside) == ("baseline", "baseline")
        changes += changed.items()
    assert {name for name, _ in changes} == set(SpeedConfig.model_fields)
    assert {("attention", "sdpa"), ("attention", "flex"), ("dtype", "bfloat16")} <= set(changes)
    assert {("float32_matmul", "high"), ("float32_matmul", "medium")} <= set(changes)
    assert {("merged_qkv", True), ("merged_gate_up", True), ("compile", True)} <= set(changes)


def test_an_ablation_turns_off_each_active_setting_alone(workload):
    asked = SpeedConfig(compile=True, dtype="bfloat16", attention="sdpa", keep_freed_memory=True)
    found = by_name(arms.ablation(workload, asked))
    assert found["all on"].speed == asked
    off = {arm.name: arm for arm in found.values() if arm.group == "all on but"}
    assert {"− attention", "− dtype", "− merged_qkv", "− merged_gate_up", "− chunked_loss"} <= set(
        off
    )
    assert {"− compile", "− recompute_cheap", "− fused_optimizer"} <= set(off)
    assert "− keep_freed_memory" in off
    assert not {"− deterministic", "− cudnn_benchmark", "− float32_matmul"} & set(off)
    for arm in off.values():
        changed = [n for n, v in arm.speed.model_dump().items() if v != asked.model_dump()[n]]
        assert changed == [arm.name.removeprefix("− ")]
        assert (arm.same_as, arm.beside) == ("baseline", "all on")


def test_a_given_setting_is_in_every_arm_and_is_not_varied(workload):
    asked = SpeedConfig(compile=False, dtype="bfloat16", merged_qkv=True)
    found = by_name(arms.ablation(workload, asked, {"compile", "dtype", "merged_qkv"}))
    for arm in found.values():
        settings = arm.speed.model_dump()
        assert settings | {"compile": False, "dtype": "bfloat16", "merged_qkv": True} == settings
        assert not {"compile", "dtype", "merged_qkv"} & set(arm.name.split())
    assert found["baseline"].speed.merged_gate_up is False
    assert {"+ merged_gate_up", "− merged_gate_up", "+ attention sdpa", "all on"} <= set(found)


def test_a_new_speed_setting_gets_arms_automatically(workload):
    class More(SpeedConfig):
        folded_norms: bool = True

    found = by_name(arms.ablation(workload, More()))
    assert found["baseline"].speed.folded_norms is False
    assert found["+ folded_norms"].speed.folded_norms is True
    assert found["− folded_norms"].speed.folded_norms is False


def test_arms_without_effect_on_a_cpu_are_left_out_with_a_reason(workload):
    left_out = {a.name: a.left_out for a in arms.ablation(workload, SpeedConfig()) if a.left_out}
    assert "convolutions" in left_out["+ cudnn_benchmark"]
    assert "TF32" in left_out["+ float32_matmul high"]
    assert "CUDA allocator" in left_out["+ expandable_segments"]
    assert "no backward pass on a CPU" in left_out["+ attention flex"]
    assert "no batch is read" in left_out["+ prefetch"]
    assert "of compiled blocks" in left_out["+ recompute_cheap"]
    assert not {"baseline", "all on", "+ attention sdpa", "+ merged_qkv"} & set(left_out)


def test_settings_that_need_a_fresh_process_get_arms(workload, monkeypatch):
    """Keep these arms although this process has loaded torch, which makes them too late here."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    found = by_name(arms.ablation(workload, SpeedConfig()))
    assert not found["+ passive_threads"].left_out
    assert not found["− passive_threads"].left_out


# --- sweep ---------------------------------------------------------------------------------------


def test_a_sweep_has_every_combination(workload):
    found = by_name(arms.sweep(workload, SpeedConfig(), ["seq-len=32,64", "micro-batch=1,2"], find))
    assert {(a.workload.seq_len, a.workload.micro_batch_size) for a in found.values()} == {
        (32, 1), (32, 2), (64, 1), (64, 2),
    }  # fmt: skip
    assert found["seq-len 32, micro-batch 2"].workload.tokens == 64


def test_window_none_gives_every_layer_full_attention(workload):
    found = by_name(arms.sweep(workload, SpeedConfig(), ["window=16,none"], find))
    narrow, dense = (found[f"window {text}"].workload.model for text in ("16", "none"))
    assert narrow.sliding_window == 16
    assert narrow.layer_types == (*(SLIDING,) * 5, FULL)
    assert dense.layer_types == (FULL,) * 6


def test_a_sweep_applies_the_model_before_the_vocabulary(workload):
    axes = ["vocab=500", "model=gemma3-tiny,qwen3-tiny"]
    found = by_name(arms.sweep(workload, SpeedConfig(), axes, find))
    models = {name: arm.workload.model for name, arm in found.items()}
    assert models["vocab 500, model qwen3-tiny"].model_type == "qwen3"
    assert {model.vocab_size for model in models.values()} == {500}


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (
            ["seqlen=3"],
            "--sweep: 'seqlen' is not one of seq-len, window, vocab, micro-batch, model; d",
        ),
        (["seq-len"], "--sweep: 'seq-len' is not of the form KEY=V1,V2"),
        (["seq-len=32,,64"], "--sweep: 'seq-len=32,,64' is not of the form KEY=V1,V2"),
        (["seq-len=0"], "--sweep: seq-len '0' is not a whole number above 0"),
        (["seq-len=many"], "--sweep: seq-len 'many' is not a whole number above 0"),
        (["seq-len=5000"], "seq-len: 5,000 is beyond the 2,048 positions of gemma3-tiny"),
        (["vocab=5", "vocab=6"], "--sweep: vocab is there twice; give its values in one"),
        (["model=qwen3-tiny", "window=3"], "--sweep: window 3: qwen3-tiny has no sliding layers"),
    ],
)
def test_an_invalid_sweep_is_refused(workload, axes, said):
    with pytest.raises(ConfigError) as error:
        arms.sweep(workload, SpeedConfig(), axes, find)
    assert str(error.value).startswith(said)


# --- comparison with a peer ----------------------------------------------------------------------


def test_a_peer_is_measured_as_shipped_and_with_our_process_settings(workload):
    pytest.importorskip("transformers")
    asked = SpeedConfig(compile=True, dtype="bfloat16")
    found = by_name(arms.versus(workload, asked, "transformers"))
    assert [arm.name for arm in found.values()] == [
        "pretrain, compiled",
        "pretrain",
        "transformers, compiled",
        "transformers",
        "transformers, compiled, tuned",
        "transformers, tuned",
    ]
    assert found["pretrain, compiled"].speed == asked
    shipped = found["transformers, compiled"].speed
    assert (shipped.dtype, shipped.compile) == ("bfloat16", True)
    assert shipped.keep_freed_memory is shipped.passive_threads is shipped.onednn_matmul is False
    same = found["transformers, compiled, tuned"].speed
    assert same == asked
    assert {arm.same_as for arm in found.values()} == {"", "pretrain, compiled"}


def test_a_comparison_with_a_peer_refuses_float8(workload):
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match="transformers does not train in float8; give --dtype"):
        arms.versus(workload, SpeedConfig(dtype="float8"), "transformers")


def test_a_comparison_without_compile_compiles_no_arm(workload):
    pytest.importorskip("transformers")
    found = arms.versus(workload, SpeedConfig(compile=False), "transformers")
    assert [arm.speed.compile for arm in found] == [False] * 3


def test_an_unknown_or_missing_peer_is_refused(workload, monkeypatch):
    with pytest.raises(ConfigError, match="'transformer' is not one of transformers; did you mean"):
        arms.versus(workload, SpeedConfig(), "transformer")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'pretrain\[verify\]'"):
        arms.versus(workload, SpeedConfig(), "transformers")


# --- experts in float32 --------------------------------------------------------------------------


def test_arms_with_compiled_experts_in_float32_are_not_run(workload):
    experts = dataclasses.replace(workload, model=preset("qwen3-30b-a3b"))
    asked = SpeedConfig(dtype="float32")
    why = "doesn't compile products of experts in float32"
    compiled = by_name(arms.ablation(experts, asked))["+ compile"]
    assert why in compiled.left_out
    for arm in arms.versus(experts, asked, "transformers"):
        assert (why in arm.left_out) is (arm.speed.compile is True)
    with pytest.raises(ConfigError, match=why):
        Rounds(
            arms.backend_arms(experts, SpeedConfig(dtype="float32", compile=True), ["sdpa"]),
            Repeats(rounds=1, steps=1, warmup=1),
        )
