"""Slot `env`: the machine, its software, and what it can do at most."""

import os
import platform
import shutil
import statistics
import subprocess
from importlib import metadata
from typing import Any

import torch

from gpu.check import Check
from gpu.measure import peak_tflops, time_calls
from pretrain_cli.engine.benchmark.record import commit
from pretrain_cli.engine.runtime.distributed import device_name, find_device
from pretrain_cli.model.attention_backends.backend import Conditions
from pretrain_cli.model.attention_backends.backends import BACKENDS, best_backend

PACKAGES = ("triton", "transformers", "torchao", "numpy", "pydantic", "flash-attn", "flash-attn-4")
QUERY = {
    "name": "name",
    "driver": "driver_version",
    "memory_mb": "memory.total",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_most_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
}
"""Figure -> nvidia-smi's name of it."""


def run(check: Check) -> None:
    device = find_device(check.device)
    with check.arm("machine") as figures:
        figures["commit"] = commit()
        figures["device"] = device_name(device)
        figures["cpu"] = f"{platform.machine()}, {os.cpu_count()} cores"
        figures["python"] = platform.python_version()
        figures["torch"] = str(torch.__version__)
        figures["cuda"] = torch.version.cuda
        figures["cudnn"] = torch.backends.cudnn.version()
        figures["c_compiler"] = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        for name in PACKAGES:
            figures[name.replace("-", "_")] = _version(name)
        if device.type == "cuda":
            figures["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
            figures["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
            figures["peak_tflops"] = peak_tflops(device)
            figures |= nvidia_smi(tuple(QUERY))
    with check.arm("attention backends") as figures:
        here = Conditions(device, torch.bfloat16, training=True, is_masked=True)
        for name, backend in BACKENDS.items():
            figures[name] = backend.unavailable(here) or "available"
        figures["auto"] = ", because ".join(best_backend(here))
        figures["note"] = "; ".join(f"{name}: {said}" for name, said in figures.items())
    with check.arm("matrix product, bfloat16") as figures:
        figures |= matmul(device, 64 if check.rehearse else 8192)
        figures |= nvidia_smi(("sm_clock_mhz", "power_w"))
    with check.arm("copy on the device") as figures:
        figures |= copy(device, 2**16 if check.rehearse else 2**32)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def nvidia_smi(figures: tuple[str, ...]) -> dict[str, str]:
    """Return what nvidia-smi says of the first GPU; nothing without the program."""
    asked = ",".join(QUERY[name] for name in figures)
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits", "--id=0"],
            capture_output=True,
            text=True,
            timeout=8,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(figures, (part.strip() for part in found.split(",")), strict=False))


def matmul(device: torch.device, size: int) -> dict[str, Any]:
    """Return the TFLOP/s of a square product of random bfloat16 matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    time_calls(product, 5, device)
    times = time_calls(product, 20, device)
    rates = [2e-12 * size**3 / seconds for seconds in times]
    return {
        "matmul_size": size,
        "matmul_tflops": statistics.median(rates),
        "matmul_most_tflops": max(rates),
    }


def copy(device: torch.device, size: int) -> dict[str, Any]:
    """Return the rate of a copy on the device, counting bytes read and written."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def once() -> None:
        target.copy_(source)

    time_calls(once, 2, device)
    times = time_calls(once, 10, device)
    return {"copied_bytes": size, "copy_gb_per_s": 2 * size / statistics.median(times) / 1e9}
