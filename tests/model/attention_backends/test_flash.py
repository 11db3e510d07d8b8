"""Other FlashAttention kernels: refused with the reason, and used by PyTorch's own switch."""

import pytest
import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.attention_backends import flash, flex

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """An H100 with every release installed, as far as the choice asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "find_spec", lambda name: object())
    return monkeypatch


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_a_release_is_refused_with_the_reason(name, gpu):
    assert flash.no_flash(name, CUDA) == ""
    assert flash.no_flash(name, torch.device("cpu")) == "it is for NVIDIA's GPUs"
    gpu.setattr(flash, "find_spec", lambda name: None)
    assert flash.no_flash(name, CUDA) == f"flash-attn-{name[-1]} is not installed"


def test_flash_attention_3_is_for_hopper_alone(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert flash.no_flash("fa4", CUDA) == ""
    assert "takes compute capability 9.0, and this GPU has 10.0" in flash.no_flash("fa3", CUDA)


def test_an_uninstalled_release_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"speed.flash_attention: 'fa3' can't be used: it is for"):
        resolve_speed(SpeedConfig(flash_attention="fa3"), torch.device("cpu"))
    speed = resolve_speed(SpeedConfig(), torch.device("cpu"))
    assert speed.decisions["flash_attention"].in_force == "fa2"


def test_a_release_is_activated_and_given_back(monkeypatch):
    calls = []
    monkeypatch.setattr(flash.attention, "activate_flash_attention_impl", calls.append)
    monkeypatch.setattr(
        flash.attention, "restore_flash_attention_impl", lambda: calls.append("restored")
    )
    flash.use_flash("fa2")
    assert calls == []
    flash.use_flash("fa4")
    monkeypatch.setattr(flash.attention, "current_flash_attention_impl", lambda: "FA4")
    flash.use_flash("fa2")
    assert calls == ["FA4", "restored"]


def test_flex_takes_the_kernel_of_flash_attention_4(monkeypatch):
    case = "cuda", 64, torch.bfloat16
    assert "BACKEND" not in flex._kernel_options(*case)
    monkeypatch.setattr(flash.attention, "current_flash_attention_impl", lambda: "FA4")
    assert flex._kernel_options(*case) == {"BACKEND": "FLASH"}
    assert flex._block_size() == {"BLOCK_SIZE": (256, 128)}


def test_wide_heads_get_a_backward_kernel_without_spills():
    """In bfloat16 alone: `WIDE_HEADS` was not chosen for float32."""
    with torch.no_grad():
        for dtype, options in ((torch.bfloat16, flex.WIDE_HEADS), (torch.float32, {})):
            assert flex._kernel_options("cuda", 256, dtype) == options
    assert flex._kernel_options("cpu", 256, torch.bfloat16) is None


def test_training_never_takes_the_kernel_for_decoding():
    assert flex._kernel_options("cuda", 64, torch.float32) == {"FORCE_USE_FLEX_ATTENTION": True}
