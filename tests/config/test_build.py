"""RunConfig: sources of a setting's value, and the messages for wrong values."""

import pytest

from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import (
    DataSettings,
    OptimizerSettings,
    SpeedConfig,
    TrainSettings,
)
from pretrain_cli.errors import ConfigError, did_you_mean

SECTIONS = {
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "train": TrainSettings,
    "speed": SpeedConfig,
}
SETTINGS = [f"{name}.{key}" for name, kind in SECTIONS.items() for key in kind.model_fields]


def refusal(*assignments, base=None, flags=None):
    """Return the one-line message of the ConfigError for these settings."""
    with pytest.raises(ConfigError) as error:
        build_config(base or {}, flags or {}, assignments)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- sources of values ---------------------------------------------------------------------------


def test_a_file_wins_over_defaults_and_flags_over_a_file():
    file = {"optimizer": {"learning_rate": 0.5, "clip": 2.0}, "train": {"seed": 3}}
    flags = {"optimizer.learning_rate": 0.25, "train.seed": None}  # None: not given
    config = build_config(file, flags, ["train.log_every=7"])
    assert config.optimizer.learning_rate == 0.25
    assert config.optimizer.clip == 2.0
    assert config.train.seed == 3
    assert config.train.log_every == 7
    assert config.optimizer.weight_decay == OptimizerSettings().weight_decay
    assert file["optimizer"]["learning_rate"] == 0.5  # the file's tree is unchanged


def test_set_wins_over_a_file_and_the_last_one_wins():
    config = build_config({"train": {"seed": 3}}, {}, ["train.seed=4", "train.seed=5"])
    assert config.train.seed == 5


def test_tokens_of_a_flag_win_over_steps_of_a_file():
    config = build_config({"train": {"steps": 100}}, {"train.tokens": 1000}, [])
    assert (config.train.tokens, config.train.steps) == (1000, "auto")


def test_values_of_set_are_yaml():
    config = build_config(
        {},
        {},
        [
            "speed.compile=false",
            "optimizer.betas=[0.8, 0.99]",
            "optimizer.eps=1.0e-6",
            "train.sample_prompts=a = b",
            "data.path=data/mine",
            "data.seq_len=auto",
        ],
    )
    assert config.speed.compile is False
    assert config.optimizer.betas == (0.8, 0.99)
    assert config.optimizer.eps == 1e-6
    assert config.train.sample_prompts == ("a = b",)
    assert config.data.path == ("data/mine",)
    assert config.data.seq_len == "auto"


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        (
            "optimizer.learnin_rate=1",
            "optimizer.learnin_rate: no such setting; did you mean optimizer.learning_rate?",
        ),
        ("speed.atention=sdpa", "speed.atention: no such setting; did you mean speed.attention?"),
        ("train.xyzzy=1", "train.xyzzy: no such setting"),
        (
            "data.stages=[{path: a}]",
            "data.stages: [{'path': 'a'}] is not a list of stages with after, path and seq_len; "
            "after is missing",
        ),
        (
            "data.stages={after: 10, lr: 3}",
            "data.stages: {'after': 10, 'lr': 3} is not a list of stages with after, path and "
            "seq_len; lr is no key of a stage",
        ),
        (
            "data.stages=[{after: 10}]",
            "data.stages: [{'after': 10}] is not stages with a path or a seq_len each",
        ),
        (
            "data.stages=[{after: 10, path: a}, {after: 10, path: b}]",
            "data.stages: [{'after': 10, 'path': 'a'}, {'after': 10, 'path': 'b'}] is not stages "
            "in the order of their after",
        ),
        ("trian.steps=1", "trian: no such section; there are model, data, optimizer, train, speed"),
        ("speed.attention=fast", "speed.attention: 'fast' is not one of auto, eager, sdpa, blocks"),
        ("speed.dtype=float16", "speed.dtype: 'float16' is not one of auto, float32, bfloat16"),
        ("speed.compile=perhaps", "speed.compile: 'perhaps' is not true or false or auto"),
        ("train.steps=ten", "train.steps: 'ten' is not a whole number or auto"),
        ("train.steps=1.5", "train.steps: 1.5 is not a whole number or auto"),
        ("train.steps=0", "train.steps: 0 is not greater than 0 or auto"),
        ("data.seq_len=-3", "data.seq_len: -3 is not greater than 0 or auto"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate: -1 is not greater than 0 or auto"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate: nan is not "),
        ("optimizer.weight_decay=x", "optimizer.weight_decay: 'x' is not a number"),
        (
            "optimizer.final_fraction=2",
            "optimizer.final_fraction: 2 is not less than or equal to 1",
        ),
        (
            "optimizer.schedule=cosin",
            "optimizer.schedule: 'cosin' is not one of cosine, linear, wsd, ",
        ),
        ("train.keep_checkpoints=0", "train.keep_checkpoints: 0 is not greater than 0"),
        ("train.parallel=zero", "train.parallel: 'zero' is not one of ddp, fsdp"),
        ("steps=3", "--set steps=3: not of the form section.name=value"),
        ("train.steps", "--set train.steps: not of the form section.name=value"),
        ("train.steps.more=3", "--set train.steps.more=3: not of the form section.name=value"),
        ("train.steps=[1", "--set train.steps=[1: '[1' is not a YAML value"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(assignment, said):
    assert refusal(assignment).startswith(said)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_refuses_a_value_of_the_wrong_type(setting):
    message = refusal(f"{setting}={{a: [1]}}")
    assert message.startswith(f"{setting}: {{'a': [1]}} is not ")
    assert "input" not in message.lower()  # pydantic's wording must not show


@pytest.mark.parametrize(
    "assignment",
    [
        pytest.param("optimizer.betas=[0.9]", id="one beta"),
        pytest.param("optimizer.betas=[1.5, 0.9]", id="a beta above 1"),
        pytest.param("optimizer.learning_rate=.inf", id="an infinite learning rate"),
        pytest.param("train.steps=true", id="true steps"),
        pytest.param("train.seed=99999999999999999999", id="a seed of more than 64 bits"),
    ],
)
def test_values_that_cannot_work_are_refused(assignment):
    name, _, _ = assignment.partition("=")
    message = refusal(assignment)
    assert message.startswith(f"{name}: ")
    assert "Field required" not in message


def test_an_unknown_backend_gets_the_nearest_name():
    assert refusal("speed.attention=fleks").endswith("did you mean flex?")


def test_steps_and_tokens_together_are_refused():
    message = refusal(flags={"train.steps": 5, "train.tokens": 1000})
    assert message == "train.tokens: 1000 and train.steps: 5 are both given; give one of them"


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("sdp", ["eager", "sdpa", "flex"], "; did you mean sdpa?"),
        ("eagre", ["eager", "sdpa", "flex"], "; did you mean eager?"),
        ("zzz", ["eager", "sdpa", "flex"], ""),
        ("fleks", ["eager", "sdpa", "flex"], "; did you mean flex?"),
        ("bf16", ["float32", "bfloat16"], "; did you mean bfloat16?"),
        ("fp16", ["float32", "bfloat16"], ""),
        ("epochs", ["steps", "tokens"], ""),
        ("lion", ["adamw", "muon"], ""),
        ("optimizer.zeta", ["optimizer.eps", "optimizer.clip"], ""),
        ("optimizer.esp", ["optimizer.eps", "optimizer.clip"], "; did you mean optimizer.eps?"),
        ("qwen3-0.7b", ["qwen3-0.6b", "gemma3-270m"], "; did you mean qwen3-0.6b?"),
        ("x", [], ""),
    ],
)
def test_the_nearest_name_is_suggested_if_one_is_similar(name, known, said):
    assert did_you_mean(name, known) == said
