"""Adding a part: what CONTRIBUTING.md names is all that a new one needs, and it appears everywhere.

The parts are added from outside the package, as a contributor would add them inside it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pretrain_cli.config import build, reference
from pretrain_cli.config.run_config import OptimizerSettings, RunConfig, SpeedConfig
from pretrain_cli.config.setting_types import Auto, SpeedSetting
from pretrain_cli.engine.benchmark.arms import ablation, parse_backends
from pretrain_cli.engine.benchmark.workload import Workload
from pretrain_cli.engine.optim.kinds import OPTIMIZERS, OptimizerKind
from pretrain_cli.engine.optim.optimizer import (
    MATRIX_OPTIMIZERS,
    build_optimizer,
    set_rates,
)
from pretrain_cli.engine.optim.recipe import make_recipe
from pretrain_cli.engine.optim.schedule import SCHEDULES, StepRates, learning_rate
from pretrain_cli.engine.planning import memory_estimate, plan
from pretrain_cli.engine.planning.memory_estimate import ATTENTION, AttentionMemory
from pretrain_cli.engine.runs import trackers
from pretrain_cli.engine.runs.events import Evaluation, Notice
from pretrain_cli.engine.runtime.speed import RULES, Rule, resolve_speed
from pretrain_cli.engine.training.step_guard import step_unless
from pretrain_cli.errors import ConfigError
from pretrain_cli.model import config, presets
from pretrain_cli.model.attention_backends.backend import Conditions
from pretrain_cli.model.attention_backends.backends import BACKENDS, best_backend
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats import gguf, hf_config, hf_fields
from pretrain_cli.model.presets import preset

CPU = torch.device("cpu")


class MoreSpeed(SpeedConfig):
    attention: Annotated[
        Literal["auto", "eager", "sdpa", "flex", "blocks", "plain"],
        SpeedSetting(decides_micro_batch=True, is_announced=True, on_any_gpu="sdpa"),
    ] = "auto"
    """Attention backend."""
    louder: Annotated[
        bool | Auto,
        SpeedSetting(is_process_wide=True, decides_micro_batch=True, is_announced=True),
    ] = "auto"
    """Turn the fans up before the first step. auto: on a CPU."""


class MoreOptimizer(OptimizerSettings):
    name: Literal["adamw", "muon", "signs"] | Auto = "auto"
    """Optimizer."""


class MoreConfig(RunConfig):
    optimizer: MoreOptimizer = MoreOptimizer()
    speed: MoreSpeed = MoreSpeed()


class Signs(torch.optim.Optimizer):
    """Step by the sign of a mean of gradients."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                memory = self.state[parameter]["memory"].lerp_(parameter.grad, 0.5)
                parameter.sub_(memory.sign(), alpha=0.1 * group["lr"])


def decide_louder(asked, here):
    if here.device.type != "cpu":
        return False, "this device has no fans of its own"
    return (True, "the room is cold") if asked == "auto" else (asked, "")


@pytest.fixture
def applied(monkeypatch):
    """Add the setting `louder`, the backend `plain` and the optimizer `signs`; return the values of
    `louder` that were applied to the process."""
    for module in (build, reference, plan):
        monkeypatch.setattr(module, "RunConfig", MoreConfig)
    values = []
    monkeypatch.setitem(RULES, "louder", Rule(decide_louder, values.append))
    backend = dataclasses.replace(
        BACKENDS["eager"],
        preferred=lambda c: "nothing is computed" if c.device.type == "meta" else None,
    )
    monkeypatch.setitem(BACKENDS, "plain", backend)
    monkeypatch.setitem(ATTENTION, "plain", AttentionMemory(lambda t, window: 1000.0))
    monkeypatch.setitem(OPTIMIZERS, "signs", OptimizerKind(("memory",), no_shards="is shy"))
    monkeypatch.setitem(MATRIX_OPTIMIZERS, "signs", lambda groups, settings, dtype: Signs(groups))
    return values


@pytest.fixture
def workload():
    model = preset("gemma3-tiny")
    return Workload(name="gemma3-tiny", model=model, seq_len=64, micro_batch_size=2, device="cpu")


def test_a_new_speed_setting_is_in_the_manual_and_checked(applied):
    assert "| `louder` | `true`, `false` or `auto` | `auto` | Turn the fans up" in (
        reference.settings_tables()
    )
    with pytest.raises(ConfigError, match=r"speed\.louder: 7 is not true or false or auto"):
        build.build_config({}, {"speed.louder": 7}, [])


def test_a_new_speed_setting_is_applied_announced_and_recorded(applied, pretrain, corpus, tiny):
    assert pretrain(f"tokenize --tokenizer bytes {corpus}").code == 0
    done = pretrain(f"train {tiny} --steps 2 --out run")
    assert done.code == 0
    assert "louder True (the room is cold)" in done.out
    assert applied == [True]
    record = yaml.safe_load(Path("run/run.yaml").read_text())
    assert record["settings"]["speed"]["louder"] == "auto"
    assert record["speed"]["louder"] == {
        "asked": "auto", "in_force": True, "reason": "the room is cold",
    }  # fmt: skip
    assert pretrain("train --resume run --steps 3 --set speed.louder=false").code == 0
    assert applied == [True, False]


def test_a_new_speed_setting_has_arms_in_an_ablation(applied, workload):
    arms = {arm.name: arm for arm in ablation(workload, MoreSpeed())}
    assert arms["+ louder"].speed.louder is True
    assert arms["− louder"].speed.louder is False
    assert "louder" in MoreSpeed.names("decides_micro_batch")
    assert "louder" in MoreSpeed.names("is_process_wide")


def test_a_new_backend_trains_as_the_one_it_copies(applied, pretrain, corpus, tiny):
    assert pretrain(f"tokenize --tokenizer bytes {corpus}").code == 0
    for name in ("plain", "eager"):
        assert pretrain(f"train {tiny} --steps 2 --attn {name} --out {name}").code == 0
    record = yaml.safe_load(Path("plain/run.yaml").read_text())
    assert record["speed"]["attention"]["in_force"] == "plain"
    losses = []
    for name in ("plain", "eager"):
        lines = map(json.loads, Path(f"{name}/metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line["kind"] == "step"])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_a_new_backend_is_benchmarked_estimated_and_chosen(applied, workload):
    assert "plain" in parse_backends("all")
    assert any(arm.name == "+ attention plain" for arm in ablation(workload, MoreSpeed()))
    nowhere = Conditions(torch.device("meta"), torch.float32, training=True)
    assert best_backend(nowhere) == ("plain", "nothing is computed")
    speed = resolve_speed(MoreSpeed(attention="plain", compile=False), CPU)
    step = memory_estimate.StepShape(
        model=workload.model,
        seq_len=64,
        micro_batch_size=2,
        device="cpu",
        **memory_estimate.speed_settings(speed),
    )
    eager = dataclasses.replace(step, attention="eager")
    estimates = [memory_estimate.estimate(shape).parts["activations"] for shape in (step, eager)]
    assert estimates[0] != estimates[1]


def test_every_list_of_backends_has_the_same_names():
    named = set(get_args(SpeedConfig.model_fields["attention"].annotation)) - {"auto"}
    assert named == set(BACKENDS) == set(ATTENTION)


def test_auto_of_every_speed_setting_is_resolved():
    speed = resolve_speed(SpeedConfig(), CPU)
    assert set(speed.decisions) == set(SpeedConfig.model_fields)
    assert not [d.setting for d in speed.decisions.values() if d.in_force == "auto"]
    assert set(RULES) <= set(SpeedConfig.model_fields)


# --- optimizers ----------------------------------------------------------------------------------


def test_a_new_optimizer_trains_saves_and_resumes_exactly(applied, pretrain, corpus, tiny):
    assert pretrain(f"tokenize --tokenizer bytes {corpus}").code == 0
    options = f"{tiny} --optimizer signs --schedule constant"
    assert pretrain(f"train {options} --steps 4 --out straight").code == 0
    assert pretrain(f"train {options} --steps 2 --out halves").code == 0
    assert pretrain("train --resume halves --steps 4").code == 0
    for name in ("model", "training/optimizer"):
        ours, theirs = (
            load_file(f"{run}/checkpoints/step-000004/{name}.safetensors")
            for run in ("straight", "halves")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    kept = {name.split(".")[0] for name in ours if "down_proj" in name}
    assert kept == {"memory"}


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_changes_no_weight_of_a_new_optimizer(applied, fused):
    """`Signs` does not know `found_inf`, as a contributor's first version might not."""
    model = Decoder(dataclasses.replace(preset("qwen3-tiny"), layer_types=("full_attention",)))
    model.initialize(0)
    recipe = make_recipe(MoreOptimizer(name="signs"), model.config, steps=10, tokens_per_step=1024)
    optimizer = build_optimizer(model, recipe, fused=fused)
    set_rates(optimizer, StepRates(0.1))
    before = [parameter.clone() for parameter in model.parameters()]
    for skip in (True, False):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        step_unless(torch.tensor(skip), optimizer)
        same = [torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True)]
        assert all(same) if skip else not any(same)


def test_a_new_optimizer_is_estimated_and_refused_where_it_cannot_run(
    applied, pretrain, corpus, tiny
):
    step = memory_estimate.StepShape(
        model=preset("qwen3-tiny"),
        seq_len=64,
        micro_batch_size=2,
        device="cpu",
        **memory_estimate.speed_settings(resolve_speed(SpeedConfig(compile=False), CPU)),
    )
    sizes = [
        memory_estimate.estimate(dataclasses.replace(step, optimizer=name)).parts["optimizer"]
        for name in ("signs", "muon", "adamw")
    ]
    assert sizes[0] == sizes[1] < sizes[2]
    assert pretrain(f"tokenize --tokenizer bytes {corpus}").code == 0
    done = pretrain(f"train {tiny} --optimizer signs --set train.parallel=fsdp")
    assert done.code == 2
    assert "optimizer.name: 'signs' is shy; use adamw, or ddp" in done.err


def test_every_list_of_optimizers_has_the_same_names():
    choices = get_args(OptimizerSettings.model_fields["name"].annotation)
    named = {name for choice in choices for name in get_args(choice)} - {"auto"}
    assert named == set(OPTIMIZERS) == {"adamw", *MATRIX_OPTIMIZERS}


# --- families, schedules and trackers ------------------------------------------------------------


@pytest.fixture
def loud_family(monkeypatch):
    """Add a family: Qwen 3 with scaled embeddings, of tiny sizes."""
    family = dataclasses.replace(
        config.FAMILIES["qwen3"], name="Loud 1", embedding_is_scaled=True, scales_by_head_dim=True
    )
    monkeypatch.setitem(config.FAMILIES, "loud", family)

    def numbers(raw):
        return {**hf_config.FAMILIES["qwen3"].numbers(raw), "embedding_is_scaled": True}

    row = hf_config.FAMILIES["qwen3"]._replace(architecture="LoudForCausalLM", numbers=numbers)
    monkeypatch.setitem(hf_config.FAMILIES, "loud", row)
    monkeypatch.setitem(hf_fields.READ, "loud", hf_fields.READ["qwen3"])
    small = dataclasses.replace(
        preset("qwen3-tiny"), model_type="loud", embedding_is_scaled=True, hidden_size=64
    )
    monkeypatch.setitem(presets.PRESETS, "loud-tiny", small)
    return small


def test_a_new_family_trains_resumes_and_is_opened_again(loud_family, pretrain, corpus):
    assert pretrain(f"tokenize --tokenizer bytes {corpus}").code == 0
    sizes = "--set model.num_hidden_layers=2 --seq-len 32 --tokens-per-step 64"
    assert pretrain(f"train --model loud-tiny {sizes} --steps 2 --out run").code == 0
    assert pretrain("train --resume run --steps 3").code == 0
    folder = Path("run/checkpoints/step-000003")
    raw = json.loads((folder / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("loud", ["LoudForCausalLM"])
    opened = hf_config.read_config(folder)
    assert opened.embedding_is_scaled
    assert opened.family.name == "Loud 1"
    assert pretrain("sample run --max-tokens 5 --no-compile").code == 0
    assert pretrain("count-params --model loud-tiny").code == 0


def test_a_new_family_is_in_the_card_and_refused_where_it_is_unknown(loud_family, pretrain, corpus):
    assert pretrain(f"tokenize --tokenizer bytes {corpus}").code == 0
    sizes = "--set model.num_hidden_layers=1 --seq-len 32 --tokens-per-step 64"
    assert pretrain(f"train --model loud-tiny {sizes} --steps 1 --out run").code == 0
    assert pretrain("export run published").code == 0
    assert "of the Loud 1 architecture" in Path("published/README.md").read_text()
    with pytest.raises(ConfigError, match=r"llama\.cpp's form of loud is not known here"):
        gguf.gguf_metadata(loud_family)
    with pytest.raises(ConfigError, match="embedding_is_scaled: False does not go with loud"):
        dataclasses.replace(loud_family, embedding_is_scaled=False)


def test_every_list_of_families_has_the_same_names():
    assert set(config.FAMILIES) == set(hf_config.FAMILIES)
    assert set(gguf.FAMILIES) <= set(config.FAMILIES)  # without a row there, it is refused
    assert set(config.FAMILIES) == set(hf_fields.READ) - {"gemma3"}  # the multimodal outer config


def test_a_new_schedule_is_followed_and_every_list_has_the_same_names(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "stairs", lambda progress, decayed: 1.0 - (progress >= 0.5))
    settings = OptimizerSettings(final_fraction=0.1).model_copy(update={"schedule": "stairs"})
    rates = [
        learning_rate(step, peak=2.0, steps=10, warmup_steps=2, settings=settings)
        for step in (0, 2, 5, 6, 9)
    ]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 0.2, 0.2])
    monkeypatch.undo()
    assert set(get_args(OptimizerSettings.model_fields["schedule"].annotation)) == set(SCHEDULES)


def test_a_new_tracker_gets_the_events_of_its_run(monkeypatch, tmp_path):
    class Paper(trackers.Tracker):
        def __init__(self, start):
            self.lines = [f"from step {start.step}"]

        def write_numbers(self, event):
            self.lines.append(event.loss)

        def write_sample(self, event):
            self.lines.append(event.text)

        def flush(self):
            pass

        def close(self):
            pass

    monkeypatch.setitem(trackers.TRACKERS, "paper", Paper)
    [paper] = trackers.open_trackers(("paper",), tmp_path, {}, lambda _: None, step=7)
    validation = {"perplexity": 7.4, "bits_per_byte": 2.9, "tokens": 1, "split_tokens": 1}
    times = {"step": 8, "time": 0.0, "evaluation_time": 0.0, "sources": {}}
    paper.take(Evaluation(loss=2.0, **validation, **times))
    paper.take(Notice("not for a tracker"))
    assert paper.lines == ["from step 7", 2.0]
