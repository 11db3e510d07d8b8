"""Data-sheet figures of GPUs, for MFU and for plans of runs on a GPU that is not present.

This module imports no torch, because a plan is arithmetic.
"""

import re
from typing import NamedTuple


class Stated(NamedTuple):
    """Data-sheet figures of one GPU."""

    flops: float
    """Peak FLOP/s in dense bfloat16."""
    memory: float
    """Bytes, in decimal units; the larger size if it is sold with two."""
    capability: tuple[int, int]
    """NVIDIA's compute capability."""


FLOAT8 = (8, 9)
"""Lowest compute capability that multiplies in float8: Ada's. Hopper has 9.0."""

# Keys are parts of the name that CUDA reports for the device.
STATED = {
    "B200": Stated(2250e12, 180e9, (10, 0)),
    "H200 NVL": Stated(835e12, 141e9, (9, 0)),
    "H200": Stated(989e12, 141e9, (9, 0)),
    "H100 PCIe": Stated(756e12, 80e9, (9, 0)),
    "H100 NVL": Stated(835e12, 94e9, (9, 0)),
    "H100": Stated(989e12, 80e9, (9, 0)),
    "GH200": Stated(989e12, 96e9, (9, 0)),
    "A100": Stated(312e12, 80e9, (8, 0)),
    "L40S": Stated(362e12, 48e9, (8, 9)),
    "L4": Stated(121e12, 24e9, (8, 9)),
    "RTX 4090": Stated(165e12, 24e9, (8, 9)),
    "RTX 3090": Stated(71e12, 24e9, (8, 6)),
}
LESS = re.compile(r"\b(Laptop|MIG|D)\b")
"""Words in the name of a slower variant or a partition of a GPU in the table."""


def stated_for(name: str) -> Stated | None:
    """Return the figures of a device by the name it reports; None if it is not in the table."""
    if LESS.search(name):
        return None
    return next((s for part, s in STATED.items() if re.search(rf"\b{part}\b", name)), None)


def called(name: str) -> str | None:
    """Return the table's name of a GPU typed as h200, H100-PCIe or rtx-4090; None if unknown."""
    typed = re.sub(r"[-_ ]+", " ", name).strip().upper()
    return next((part for part in STATED if part.upper() == typed), None)
