"""Float32 matrix products by oneDNN: their precision, and when they are used."""

import pytest
import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.runtime import onednn
from pretrain_cli.engine.runtime.speed import apply_process_settings, resolve_speed

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or torch.cpu._is_amx_tile_supported(),
    reason="oneDNN is absent, or would compute in bfloat16",
)


@pytest.fixture(autouse=True)
def _as_before():
    yield
    torch.set_float32_matmul_precision("highest")


def decided(asked, **changes):
    return resolve_speed(SpeedConfig(onednn_matmul=asked, **changes), CPU)


@needs_onednn
def test_onednn_products_have_float32_precision():
    a, b = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(1))
    exact = a.double() @ b.double()
    apply_process_settings(decided(True))
    error = (a @ b - exact).abs().max() / exact.abs().max()
    rounded = (a.bfloat16() @ b.bfloat16() - exact).abs().max() / exact.abs().max()
    assert error < 2e-6
    assert rounded > 1e-3  # the error if products were in bfloat16


@needs_onednn
@pytest.mark.parametrize(("maker", "on"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_auto_uses_onednn_on_amd_only(monkeypatch, maker, on):
    monkeypatch.setattr(onednn, "_maker", lambda: maker)
    decision = decided("auto").decisions["onednn_matmul"]
    assert decision.in_force is on
    assert decision.reason


def test_onednn_is_off_with_amx_and_gives_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    decision = decided(True).decisions["onednn_matmul"]
    assert decision.in_force is False
    assert "bfloat16" in decision.reason or "without oneDNN" in decision.reason


@needs_onednn
def test_onednn_is_off_if_its_products_are_inaccurate(monkeypatch):
    real = torch.Tensor.__matmul__

    def rounded(a, b):
        product = real(a, b)
        return product.bfloat16().float() if product.dtype == torch.float32 else product

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    decision = decided(True).decisions["onednn_matmul"]
    assert decision.in_force is False
    assert "off by" in decision.reason


@needs_onednn
def test_resolving_settings_does_not_change_torchs_precision():
    torch.set_float32_matmul_precision("highest")
    before = torch.backends.mkldnn.matmul.fp32_precision
    decided(True)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    apply_process_settings(decided(False))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
