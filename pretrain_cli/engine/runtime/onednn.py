"""float32 matrix products on a CPU by oneDNN, where PyTorch's own choice, MKL, is slow.

MKL takes a slow path on processors that are not Intel's. PyTorch leaves float32 products to oneDNN
when it is allowed to round them to bfloat16; on a processor with AMX tiles it then does, and on one
without it computes in float32 all the same. So this is for the latter alone, and what comes out is
compared with float64 before it is relied on.
"""

import platform
from pathlib import Path
from typing import Any

import torch

SIZE = 256
"""Size of the products that are compared: 3 ms in all."""
LARGEST_ERROR = 1e-5
"""Largest error, as a share of the largest element. Float32 stays below 1e-6, bfloat16 reaches
3e-3."""


def onednn_matmul(asked: bool | str, device: torch.device) -> tuple[bool, str]:
    """(whether oneDNN computes float32 products, why where that is not what was asked)."""
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
    """For the whole process; after `set_float32_matmul_precision`, which takes it back."""
    if in_force:
        _matmul().fp32_precision = "bf16"


def _unfit() -> str | None:
    """Why oneDNN can't take over float32 products here, if so."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    if torch.cpu._is_amx_tile_supported():
        return "this processor would compute in bfloat16"
    error = _error()
    if error > LARGEST_ERROR:
        return f"its float32 products are off by {error:.0e}"
    return None


def _error() -> float:
    """The largest error of a product by oneDNN, as a share of the largest element."""
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
    """As the processor calls itself on x86: GenuineIntel, AuthenticAMD; else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "vendor_id" in line)
    except (OSError, StopIteration):
        return platform.machine()
