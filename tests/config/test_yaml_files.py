"""YAML files: settings by section, shipped configurations, and models."""

from pathlib import Path

import pytest
import yaml

from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import (
    ModelSettings,
)
from pretrain_cli.config.yaml_files import find_model, read_config
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.presets import preset

SHIPPED = Path(__file__).parent.parent.parent / "configs"


def read(tmp_path, text):
    (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config(str(tmp_path / "run.yaml"))


def test_a_file_holds_sections_of_settings(tmp_path):
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
def test_every_shipped_file_is_found_by_name_and_is_complete(file):
    config = build_config(read_config(file.stem), {}, [])
    assert config == build_config(read_config(str(file)), {}, [])
    find_model(config.model)
    for section, values in yaml.safe_load(file.read_text()).items():
        for name, value in values.items():  # every value in the file arrives unchanged
            assert getattr(getattr(config, section), name) == value


def test_an_unknown_file_gets_the_nearest_shipped_name():
    with pytest.raises(ConfigError) as error:
        read_config("gemma3-27m")
    message = str(error.value)
    assert message.startswith("--config: no file 'gemma3-27m', and none of the built-in ones (")
    assert message.endswith("did you mean gemma3-270m?")


def test_a_model_is_a_name_and_changed_fields():
    name, config = find_model(ModelSettings(name="gemma3", **{"sliding_window": 64}))
    assert name == "gemma3-270m"
    assert config.sliding_window == 64
    assert config.hidden_size == preset("gemma3-270m").hidden_size
    with pytest.raises(ConfigError, match=r"model.hiden_size: no such setting; did you mean"):
        find_model(ModelSettings(**{"hiden_size": 64}))


def test_a_model_file_holds_changes_to_a_known_model(tmp_path):
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
def test_an_invalid_model_file_is_refused(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        find_model(ModelSettings(name=str(path)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_model_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model: no file .*nowhere\.yaml; give a YAML file or"):
        find_model(ModelSettings(name=str(tmp_path / "nowhere.yaml")))
