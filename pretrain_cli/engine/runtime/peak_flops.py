"""Peak FLOP/s of a device, the denominator of MFU: stated by its maker, and measured with a matrix
product. Both carry their source.
"""

import functools
import time
from dataclasses import dataclass

import torch

from pretrain_cli.engine.runtime.gpu_specs import stated_for

LARGEST = 8192
PRODUCTS = 16
"""Products of the next size that must fit in the given time before the matrices grow to it."""


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of one device."""

    flops: float
    """FLOP/s that MFU refers to: stated if the device is in the table, else measured."""
    source: str
    measured: float


def find_peak(device: torch.device, dtype: torch.dtype, *, seconds: float) -> Peak:
    """Return the device's peak in this dtype, measured for about `seconds`. Restarts the count of
    the peak of memory on a GPU."""
    measured, size = _measure(device, dtype, seconds)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    name, stated = _stated(device, dtype)
    if stated is not None:
        return Peak(stated, f"stated for {name}, dense bfloat16", measured)
    source = f"measured, {size}³ matrix product in {str(dtype).removeprefix('torch.')}"
    return Peak(measured, source, measured)


def _stated(device: torch.device, dtype: torch.dtype) -> tuple[str, float | None]:
    """Return (device name, stated peak FLOP/s). The peak is None if it is unknown or if `dtype`
    is not bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return device.type, None
    name = torch.cuda.get_device_name(device)
    stated = stated_for(name)
    return name, stated.flops if stated else None


@functools.cache
def _measure(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[float, int]:
    """Return (best FLOP/s of a square matrix product, its size), cached in the process.

    Sizes grow while products are short. A large product on a slow device would exceed the given
    time; a small product on a fast device would not reach its peak.
    """
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's generator unchanged
    best, best_size, size, matrix = 0.0, 0, 128, None
    until = time.perf_counter() + seconds
    while matrix is None or time.perf_counter() < until:
        if matrix is None:
            matrix = torch.randn(size, size, device=device, generator=generator).to(dtype)
            (matrix @ matrix)[0, 0].item()  # warm-up: the library initializes itself
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        took = time.perf_counter() - began
        if 2 * size**3 / took > best:
            best, best_size = 2 * size**3 / took, size
        if 8 * took < seconds / PRODUCTS and size < LARGEST:
            size, matrix = 2 * size, None
    matrix = None  # freed first: the peak of memory starts again from what is left
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return best, best_size
