"""Losses of other libraries, to compare the chunked loss with.

    summed(hidden, weight, targets)      (N, D), (V, D), (N,) -> the sum of the cross entropies

hidden and weight have the compute type. Targets of −100 are ignored. None of them has our z-loss.

    torch   F.linear_cross_entropy: chunks of tokens, as ours
    liger   liger-kernel: chunks of tokens
    cce     cut-cross-entropy: no logits in memory; they are computed again for the gradients
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_cli.compilers import no_triton
from pretrain_cli.targets import IGNORE_INDEX


@dataclass(frozen=True)
class LossBackend:
    """One implementation of the loss."""

    summed: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(hidden, weight, targets) -> the summed cross entropy."""
    unavailable: Callable[[torch.device], str | None]
    """The reason this implementation can't train on this device, or None."""


def _torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(
        hidden,
        weight,
        targets,
        reduction="sum",
        ignore_index=IGNORE_INDEX,
        options=nn.LinearCrossEntropyOptions(),
    )


def _no_torch(device: torch.device) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy; torch 2.13 has"
    return None


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return functional.liger_fused_linear_cross_entropy(
        hidden,
        weight,
        targets,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        accum_dtype=torch.float32,
    )


def _no_liger(device: torch.device) -> str | None:
    return _no_kernels(device, "liger_kernel", "pip install liger-kernel")


CCE = "cce_kahan_full_c"
"""Implementation of cut-cross-entropy for pretraining: its default leaves small gradients out."""
CCE_SOURCE = "pip install git+https://github.com/apple/ml-cross-entropy"


def _cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORE_INDEX, reduction="sum", impl=CCE
    )


def _no_cce(device: torch.device) -> str | None:
    if reason := _no_kernels(device, "cut_cross_entropy", CCE_SOURCE):
        return reason
    try:
        presets = importlib.import_module("cut_cross_entropy.cce_utils").CCEPresets.names
    except ModuleNotFoundError:  # 25.1.1, which PyPI has
        presets = ()
    return None if CCE in presets else f"cut-cross-entropy has no {CCE} ({CCE_SOURCE})"


def _no_kernels(device: torch.device, package: str, install: str) -> str | None:
    if device.type != "cuda":
        return "its kernels are for GPUs"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed ({install})"
    return no_triton() or None


LOSS_BACKENDS: dict[str, LossBackend] = {
    "torch": LossBackend(_torch, _no_torch),
    "liger": LossBackend(_liger, _no_liger),
    "cce": LossBackend(_cce, _no_cce),
}
"""Implementations by the name that `speed.chunked_loss` gives them."""
