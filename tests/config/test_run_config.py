"""RunConfig: where a setting's value comes from, and what is said when it is wrong."""

from pathlib import Path

import pytest
import yaml

from pretrain_cli.config.build import build_config, check_config
from pretrain_cli.config.run_config import (
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    RunConfig,
    SpeedConfig,
    TrainSettings,
)
from pretrain_cli.config.yaml_files import find_model, read_config
from pretrain_cli.errors import ConfigError, did_you_mean
from pretrain_cli.model.presets import preset

SHIPPED = Path(__file__).parent.parent.parent / "configs"
SECTIONS = {
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "train": TrainSettings,
    "speed": SpeedConfig,
}
SETTINGS = [f"{name}.{key}" for name, kind in SECTIONS.items() for key in kind.model_fields]


def refusal(*assignments, base=None, flags=None):
    """The one line that these settings are refused with."""
    with pytest.raises(ConfigError) as error:
        build_config(base or {}, flags or {}, assignments)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- where values come from ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "tokens"),
    [("5B", 5 * 10**9), ("200M", 2 * 10**8), ("2.3b", 23 * 10**8), ("1.5T", 15 * 10**11),
     ("10k", 10_000), ("1000", 1000), (1000, 1000)],
)  # fmt: skip
def test_tokens_are_given_as_people_say_them(said, tokens):
    assert build_config({}, {"train.tokens": said}, []).train.tokens == tokens


@pytest.mark.parametrize("said", ["5X", "B", "-5B", "0", "0.5", "1.2345k", "5 GB", ""])
def test_what_is_no_number_of_tokens_is_refused(said):
    with pytest.raises(ConfigError, match="is not a number such as 5B, 200M"):
        build_config({}, {"train.tokens": said}, [])


def test_a_file_wins_over_defaults_and_flags_over_a_file():
    file = {"optimizer": {"learning_rate": 0.5, "clip": 2.0}, "train": {"seed": 3}}
    flags = {"optimizer.learning_rate": 0.25, "train.seed": None}  # None: not given
    config = build_config(file, flags, ["train.log_every=7"])
    assert config.optimizer.learning_rate == 0.25
    assert config.optimizer.clip == 2.0
    assert config.train.seed == 3
    assert config.train.log_every == 7
    assert config.optimizer.weight_decay == OptimizerSettings().weight_decay
    assert file["optimizer"]["learning_rate"] == 0.5  # the file's tree is left alone


def test_set_wins_over_a_file_and_the_last_one_wins():
    config = build_config({"train": {"seed": 3}}, {}, ["train.seed=4", "train.seed=5"])
    assert config.train.seed == 5


def test_tokens_of_a_flag_win_over_steps_of_a_file():
    config = build_config({"train": {"steps": 100}}, {"train.tokens": 1000}, [])
    assert (config.train.tokens, config.train.steps) == (1000, "auto")


def test_with_nothing_said_everything_has_a_default():
    assert build_config({}, {}, []) == RunConfig()
    assert RunConfig().model.name == "gemma3"


def test_these_speed_settings_can_be_switched():
    assert set(SpeedConfig.model_fields) >= {
        "attention", "dtype", "float32_matmul", "compile", "merged_qkv", "merged_gate_up",
        "fused_optimizer", "chunked_loss", "activation_checkpointing", "prefetch",
        "cudnn_benchmark", "expandable_segments",
    }  # fmt: skip


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


def test_a_config_cannot_be_changed_behind_ones_back():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_dumped_is_read_back_the_same():
    config = build_config({}, {"data.path": Path("d")}, ["model.num_hidden_layers=2"])
    assert check_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("given", "paths", "dumped"),
    [
        ("data/a", ("data/a",), "data/a"),
        (Path("data/a"), ("data/a",), "data/a"),
        (["data/a"], ("data/a",), "data/a"),
        (["data/a:0.7", "data/b:0.3"], ("data/a:0.7", "data/b:0.3"), ["data/a:0.7", "data/b:0.3"]),
        (None, None, None),
    ],
)
def test_data_is_one_path_or_a_list(given, paths, dumped):
    config = check_config({"data": {"path": given}})
    assert config.data.path == paths
    assert config.model_dump(mode="json")["data"]["path"] == dumped


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        (
            "optimizer.learnin_rate=1",
            "optimizer.learnin_rate: no such setting; did you mean optimizer.learning_rate?",
        ),
        ("speed.atention=sdpa", "speed.atention: no such setting; did you mean speed.attention?"),
        ("train.xyzzy=1", "train.xyzzy: no such setting"),
        ("trian.steps=1", "trian: no such section; there are model, data, optimizer, train, speed"),
        ("speed.attention=fast", "speed.attention: 'fast' is not one of auto, eager, sdpa, flex"),
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
def test_every_setting_refuses_what_it_does_not_take(setting):
    message = refusal(f"{setting}={{a: [1]}}")
    assert message.startswith(f"{setting}: {{'a': [1]}} is not ")
    assert "input" not in message.lower()  # pydantic's own words


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
def test_the_nearest_name_is_offered_where_one_is_near(name, known, said):
    assert did_you_mean(name, known) == said


# --- files ---------------------------------------------------------------------------------------


def read(tmp_path, text):
    (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config(str(tmp_path / "run.yaml"))


def test_a_file_is_sections_of_settings(tmp_path):
    tree = read(tmp_path, "model:\n  name: qwen3-tiny\noptimizer:\n  learning_rate: 1.0e-3\n")
    config = build_config(tree, {}, [])
    assert (config.model.name, config.optimizer.learning_rate) == ("qwen3-tiny", 1e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [\n", "not YAML"),
        (b"model: \xff\n", "not YAML"),
        ("", "holds no settings; give a mapping"),
        ("- model\n", "holds no settings; give a mapping"),
        ("modle:\n  name: qwen3\n", "modle: no such section; there are model, data, optimizer"),
        ("train: 5\n", "train: 5 is not a section of settings"),
        ("train:\n", "train: None is not a section of settings"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text, said):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'run.yaml'}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_is_a_run_that_can_be_asked_for_by_name(file):
    config = build_config(read_config(file.stem), {}, [])
    assert config == build_config(read_config(str(file)), {}, [])
    find_model(config.model)
    for section, values in yaml.safe_load(file.read_text()).items():
        for name, value in values.items():  # nothing in it is lost or turned into something else
            assert getattr(getattr(config, section), name) == value


def test_an_unknown_file_gets_the_nearest_shipped_name():
    with pytest.raises(ConfigError) as error:
        read_config("gemma3-27m")
    message = str(error.value)
    assert message.startswith("--config: no file 'gemma3-27m', and none of the built-in ones (")
    assert message.endswith("did you mean gemma3-270m?")


# --- models --------------------------------------------------------------------------------------


def test_a_model_is_a_name_and_changes_to_it():
    name, config = find_model(ModelSettings(name="gemma3", **{"sliding_window": 64}))
    assert name == "gemma3-270m"
    assert config.sliding_window == 64
    assert config.hidden_size == preset("gemma3-270m").hidden_size
    with pytest.raises(ConfigError, match=r"model.hiden_size: no such setting; did you mean"):
        find_model(ModelSettings(**{"hiden_size": 64}))


def test_a_model_file_says_what_differs_from_a_known_model(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: qwen3-tiny\nnum_hidden_layers: 3\nhidden_size: 64\n")
    name, config = find_model(ModelSettings(name=str(path), **{"hidden_size": 128}))
    assert name == "mine"
    assert (config.num_hidden_layers, config.hidden_size) == (3, 128)
    assert config.head_dim == preset("qwen3-tiny").head_dim


def test_a_model_file_may_state_every_number(tmp_path):
    numbers = vars(preset("gemma3-1b"))
    path = tmp_path / "whole.yaml"
    path.write_text(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v
                                    for k, v in numbers.items()}))  # fmt: skip
    assert find_model(ModelSettings(name=str(path))) == ("whole", preset("gemma3-1b"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: gema3\n", "model: 'gema3' is not a model or a YAML file; did you mean gemma3?"),
        ("hidden_size: 64\n", "decoder_sparse_step is missing; state every number"),
        ("base: gemma3-tiny\nhiden_size: 64\n", "model.hiden_size: no such setting; did you mean"),
        ("base: gemma3-tiny\nhidden_size: wide\n", "model.hidden_size: 'wide' is not a whole numb"),
        ("base: gemma3-tiny\nnum_key_value_heads: 3\n", "does not divide num_attention_heads 4"),
        ("base: [\n", "not YAML"),
        ("base: 5\n", "5"),
    ],
)
def test_a_model_file_that_is_no_model_is_refused(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        find_model(ModelSettings(name=str(path)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model: no file .*nowhere\.yaml; give a YAML file or"):
        find_model(ModelSettings(name=str(tmp_path / "nowhere.yaml")))
