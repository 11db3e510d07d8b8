"""RunConfig: its defaults, frozen fields, and an unchanged value after dump and load."""

from pathlib import Path

import pytest
import yaml

from pretrain_cli.config.build import build_config, check_config
from pretrain_cli.config.run_config import (
    RunConfig,
    SpeedConfig,
)


def test_with_nothing_said_everything_has_a_default():
    assert build_config({}, {}, []) == RunConfig()
    assert RunConfig().model.name == "gemma3"


def test_these_speed_settings_can_be_switched():
    assert set(SpeedConfig.model_fields) >= {
        "attention", "dtype", "float32_matmul", "compile", "merged_qkv", "merged_gate_up",
        "fused_optimizer", "chunked_loss", "activation_checkpointing", "prefetch",
        "cudnn_benchmark", "expandable_segments",
    }  # fmt: skip


def test_a_config_cannot_be_changed_behind_ones_back():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_dumped_is_read_back_the_same():
    config = build_config({}, {"data.path": Path("d")}, ["model.num_hidden_layers=2"])
    assert check_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
