"""Losses of other libraries: each is a value of `speed.chunked_loss`, or refused by name."""

from typing import get_args

import pytest
import torch

from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark.arms import ablation
from pretrain_cli.engine.benchmark.workload import Workload
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.errors import ConfigError
from pretrain_cli.model import loss_backends
from pretrain_cli.model.loss_backends import LOSS_BACKENDS
from pretrain_cli.model.presets import preset

CPU = torch.device("cpu")


def test_the_setting_has_the_name_of_every_loss():
    _, names = get_args(SpeedConfig.model_fields["chunked_loss"].annotation)
    assert set(get_args(names)) == set(LOSS_BACKENDS)


@pytest.mark.parametrize("name", ["liger", "cce"])
def test_kernels_for_gpus_are_refused_on_a_cpu(name):
    with pytest.raises(ConfigError, match=f"'{name}' can't be used: its kernels are for GPUs; use"):
        resolve_speed(SpeedConfig(chunked_loss=name), CPU)


def test_a_loss_that_only_trains_is_replaced_where_nothing_trains():
    speed = resolve_speed(SpeedConfig(chunked_loss="cce"), CPU, training=False)
    assert speed.chunked_loss is True
    assert speed.departures() == ["speed.chunked_loss: True, cce is a way to train"]


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(loss_backends.importlib.util, "find_spec", lambda name: None)
    reason = LOSS_BACKENDS["liger"].unavailable(torch.device("cuda"))
    assert reason == "liger_kernel is not installed (pip install liger-kernel)"


def test_a_torch_without_the_loss_is_named(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert "has no linear_cross_entropy" in str(LOSS_BACKENDS["torch"].unavailable(CPU))


def test_a_z_loss_is_refused_with_a_loss_that_has_none():
    with pytest.raises(ConfigError, match=r"'torch' has no optimizer\.z_loss; use true"):
        build_config({}, {"speed.chunked_loss": "torch", "optimizer.z_loss": 1e-4}, [])


def test_an_ablation_has_an_arm_for_each_loss_or_the_reason_against():
    model = preset("gemma3-tiny")
    work = Workload(name="gemma3-tiny", model=model, seq_len=64, micro_batch_size=2, device="cpu")
    arms = {arm.name: arm for arm in ablation(work, SpeedConfig())}
    assert arms["+ chunked_loss"].speed.chunked_loss is True
    assert arms["− chunked_loss"].speed.chunked_loss is False
    assert arms["+ chunked_loss torch"].speed.chunked_loss == "torch"
    assert "its kernels are for GPUs" in arms["+ chunked_loss cce"].left_out
