"""run.yaml read back: complete, refused if damaged, and readable by later versions."""

import pytest
import yaml

from pretrain_cli.config.build import build_config, check_config
from pretrain_cli.engine.runs.run_yaml import differences, read_record, resumed_settings
from pretrain_cli.errors import CheckpointError, ConfigError


@pytest.fixture
def trained(settings, run, tmp_path):
    run(settings("run", train__steps=1))
    return tmp_path / "run"


def edit(folder, change):
    path = folder / "run.yaml"
    tree = yaml.safe_load(path.read_text())
    change(tree)
    path.write_text(yaml.safe_dump(tree))


def test_a_run_with_a_removed_speed_setting_is_read(trained):
    expected = check_config(read_record(trained).settings)

    def add(tree):
        tree["settings"]["speed"]["huge_pages"] = "auto"
        tree["asked"]["speed"]["huge_pages"] = True

    edit(trained, add)
    record = read_record(trained)
    assert check_config(record.settings) == expected
    check_config(record.asked)


@pytest.mark.parametrize("key", ["settings", "asked", "model", "dataset", "machine"])
def test_a_run_yaml_without_a_section_is_refused_as_damaged(trained, key):
    edit(trained, lambda tree: tree.pop(key))
    with pytest.raises(CheckpointError, match=r"run\.yaml: damaged"):
        read_record(trained)


def test_a_folder_without_run_yaml_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="--resume takes the folder of a run"):
        read_record(tmp_path)


def test_every_difference_is_named_with_both_values():
    before = build_config({}, {"train.steps": 3}, [])
    now = build_config({}, {"train.steps": 5, "optimizer.clip": 2.0}, [])
    assert set(differences(before, now)) == {
        ("train.steps", 3, 5),
        ("optimizer.clip", 1.0, 2.0),
    }


def test_a_change_of_gradient_clipping_needs_allow_change(trained):
    record = read_record(trained)
    changed = build_config(record.settings, {"optimizer.clip": 2.0}, [])
    with pytest.raises(ConfigError, match=r"optimizer\.clip: 2\.0 differs.*--allow-change"):
        resumed_settings(record, changed)
    assert resumed_settings(record, changed, allow_change=True) is changed
