"""Compute float32 matrix products on a CPU with oneDNN if PyTorch's default, MKL, is slow.

MKL takes a slow path on processors that are not Intel's. PyTorch uses oneDNN for float32 products
only if oneDNN may round them to bfloat16 (`fp32_precision = "bf16"`). With AMX tiles oneDNN then
does round; without them it computes in float32 all the same. The setting is therefore only for
processors without AMX tiles, and a product is compared with float64 first.
"""

import platform
from pathlib import Path
from typing import Any

import torch

SIZE = 256
"""Rows and columns of the matrices in the comparison, which takes 3 ms."""
LARGEST_ERROR = 1e-5
"""Largest accepted error, as a share of the largest element. Float32 stays below 1e-6, bfloat16
reaches 3e-3."""


def onednn_matmul(asked: bool | str, device: torch.device) -> tuple[bool, str]:
    """Return (True if oneDNN computes float32 products, reason; empty if as asked)."""
    if asked is False:
        return False, ""
    if device.type != "cpu":
        return False, "a setting of the CPU's matrix products"
    if asked == "auto" and _maker() != "AuthenticAMD":
        return False, "not tried on this processor; on AMD's it is the faster"
    if reason := _unfit():
        return False, reason
    return True, "" if asked is True else "faster in float32 on this processor than MKL"


def apply(in_force: bool) -> None:
    """Turn oneDNN's float32 products on for the whole process.

    Call it after `set_float32_matmul_precision`, which resets the setting.
    """
    if in_force:
        _matmul().fp32_precision = "bf16"


def _unfit() -> str | None:
    """Return the reason why oneDNN can't compute float32 products here; None if it can."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    if torch.cpu._is_amx_tile_supported():  # pyright: ignore[reportPrivateUsage]
        return "this processor would compute in bfloat16"
    error = _error()
    if error > LARGEST_ERROR:
        return f"its float32 products are off by {error:.0e}"
    return None


def _error() -> float:
    """Return the largest error of a oneDNN product, as a share of the largest element."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, SIZE, SIZE, generator=generator)
    before = _matmul().fp32_precision
    _matmul().fp32_precision = "bf16"
    product = a @ b
    _matmul().fp32_precision = before
    exact = a.double() @ b.double()
    return float((product - exact).abs().max() / exact.abs().max())


def _matmul() -> Any:
    return torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]


def _maker() -> str:
    """Return the x86 vendor id, such as GenuineIntel or AuthenticAMD; else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "vendor_id" in line)
    except (OSError, StopIteration):
        return platform.machine()
