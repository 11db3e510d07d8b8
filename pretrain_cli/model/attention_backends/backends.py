"""Attention backends: implementations behind one signature, and the choice of `auto`.

    attend(q, k, v, mask, scale)      q (B, T, H, Dh), k and v (B, S, Hkv, Dh) -> (B, T, H, Dh)

A Mask describes which keys each query sees. Each backend lowers it to its own form, once per step
and layer type, outside the layers:

    eager   a boolean matrix; the readable reference that the others are tested against
    sdpa    a flag, blocks, or an additive matrix: PyTorch's fused attention
    blocks  window and documents: blocks of queries by matrix products, for CPUs
    flex    a BlockMask: PyTorch's flex_attention, which skips fully masked blocks
    varlen  where sequences start: FlashAttention's kernels, for GPUs

The queries are the last T of S positions, so a cache of earlier keys needs no other mask:

    T = 3, S = 5, window 3:      keys 0 1 2 3 4
                        query 0       █ █ █ · ·
                        query 1       · █ █ █ ·
                        query 2       · · █ █ █

With document numbers, attention stays inside each document of a row:

    documents 0 0 0 1 1:         keys 0 1 2 3 4
                        query 0       █ · · · ·
                        query 1       █ █ · · ·
                        query 2       █ █ █ · ·
                        query 3       · · · █ ·
                        query 4       · · · █ █
"""

from pretrain_cli.model.attention_backends import blocks, eager, flex, sdpa, varlen
from pretrain_cli.model.attention_backends.backend import Backend, Conditions

BACKENDS: dict[str, Backend] = {
    "eager": eager.BACKEND,
    "sdpa": sdpa.BACKEND,
    "blocks": blocks.BACKEND,
    "flex": flex.BACKEND,
    "varlen": varlen.BACKEND,
}
"""Backends by name. `auto` tries the last one first."""


def best_backend(conditions: Conditions) -> tuple[str, str]:
    """Return the backend that `auto` takes, and the reason; with it, why each one that would have
    been better can't run."""
    refused: list[str] = []
    for name, backend in reversed(BACKENDS.items()):
        reason, against = backend.preferred(conditions), backend.unavailable(conditions)
        if reason and not against:
            return name, "; ".join([reason, *refused])
        if reason:
            refused.append(f"not {name}: {against}")
    raise AssertionError("no backend runs everywhere")
