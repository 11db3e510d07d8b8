"""RunConfig: its defaults, frozen fields, and an unchanged value after dump and load."""

from pathlib import Path

import pytest
import yaml

from pretrain_cli.config.build import build_config, check_config
from pretrain_cli.config.run_config import (
    RunConfig,
    SpeedConfig,
)


def test_every_setting_has_a_default():
    assert build_config({}, {}, []) == RunConfig()
    assert RunConfig().model.name == "gemma3"


def test_speed_config_has_these_settings():
    assert set(SpeedConfig.model_fields) >= {
        "attention", "dtype", "float32_matmul", "compile", "merged_qkv", "merged_gate_up",
        "fused_optimizer", "chunked_loss", "activation_checkpointing", "prefetch",
        "cudnn_benchmark", "expandable_segments",
    }  # fmt: skip


def test_a_run_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_dumped_config_is_read_back_equal():
    config = build_config({}, {"data.path": Path("d")}, ["model.num_hidden_layers=2"])
    assert check_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
