"""Rotary position embeddings: rotate pairs of a head's values by angles proportional to position.
The pairs are split by halves: value i goes with value i + Dh / 2.

Angles are computed in float32 from integer positions in every forward pass. This is T × Dh numbers,
less than a thousandth of a layer's work, and leaves no buffer that `.to(bfloat16)` could round.
"""

import torch
from torch import Tensor


def rope_table(
    positions: Tensor, head_dim: int, *, base: float, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of these positions. (..., T) -> two of (..., T, 1, Dh).

    `factor` divides the positions (linear scaling). The 1 is the heads' dimension.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / base ** (exponents / head_dim) / factor
    angles = positions.float().unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys by their positions' angles. (B, T, heads, Dh) -> the same shape."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
