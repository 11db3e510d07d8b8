"""Other releases of FlashAttention's kernels, in place of the ones that PyTorch has built in.

PyTorch can redirect its own operators to an installed package: those of `sdpa` and `varlen` to
FlashAttention 3 or 4, and `flex` takes FlashAttention 4 as its kernel.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch.nn import attention

BUILT_IN = "fa2"


class Release(NamedTuple):
    """One release: the package that has its kernels, and the GPUs it is for."""

    name: str
    """Its name in `torch.nn.attention.activate_flash_attention_impl`."""
    package: str
    module: str
    majors: tuple[int, ...]
    """Major compute capabilities."""


RELEASES = {
    "fa3": Release("FA3", "flash-attn-3", "flash_attn_interface", (9,)),
    "fa4": Release("FA4", "flash-attn-4", "flash_attn", (9, 10)),
}
"""Releases by their name in speed.flash_attention."""


def no_flash(name: str, device: torch.device) -> str:
    """Return the reason why this release can't be used; empty if it can."""
    release = RELEASES[name]
    if device.type != "cuda" or torch.version.hip:
        return "it is for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in release.majors:
        needed = " or ".join(f"{major}.0" for major in release.majors)
        has = f"{capability[0]}.{capability[1]}"
        return f"it takes compute capability {needed}, and this GPU has {has}"
    if not hasattr(attention, "activate_flash_attention_impl"):
        return "this PyTorch can't take other kernels; 2.11 can"
    return "" if find_spec(release.module) else f"{release.package} is not installed"


def use_flash(name: str) -> None:
    """Use the kernels of this release in the whole process."""
    if name != BUILT_IN:
        attention.activate_flash_attention_impl(RELEASES[name].name)
    elif flash_kernels():
        attention.restore_flash_attention_impl()


def flash_kernels() -> str | None:
    """Return the release in use, as PyTorch names it; None for the built-in kernels."""
    current: Callable[[], str | None] | None = getattr(
        attention, "current_flash_attention_impl", None
    )
    return current() if current else None
