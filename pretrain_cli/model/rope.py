"""Rotary position embeddings: each half-split pair of a head's numbers is turned by an angle that
grows with the position.

Angles are made in float32 from plain integers at every forward pass: T × Dh numbers, less than a
thousandth of a layer's work, and no buffer that `.to(bfloat16)` could round.
"""

import torch
from torch import Tensor


def rope_table(
    positions: Tensor, head_dim: int, *, base: float, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for these positions. (..., T) -> two of (..., T, 1, Dh).

    `factor` divides the positions (linear scaling). The 1 stands for the heads.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / base ** (exponents / head_dim) / factor
    angles = positions.float().unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys by their positions' angles. (B, T, heads, Dh) -> the same."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
