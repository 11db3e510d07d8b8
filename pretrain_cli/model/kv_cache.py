"""What sampling remembers of the tokens so far: every layer's keys and values.

A full layer remembers all of them; a sliding layer the last window − 1, which with the new token's
own make the window that its queries see.
"""

import torch
from torch import Tensor

from pretrain_cli.model.config import ModelConfig


class LayerCache:
    """One layer's keys and values, the last `remembered` of them between calls.

    They lie in a buffer (B, room, Hkv, Dh) and slide to its front only when it is full; where room
    is twice what is remembered that is rare, so adding a token costs no copy of the rest.
    """

    def __init__(self, buffer: Tensor, remembered: int) -> None:
        self.remembered = remembered
        self.keys = buffer
        self.values = torch.empty_like(self.keys)
        self.start = self.end = 0

    def __len__(self) -> int:
        return self.end - self.start

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add T new positions; give the remembered ones and these. (B, T, ...) -> (B, S, ...)."""
        new = k.shape[1]
        if len(self) + new > self.keys.shape[1]:  # a long prompt: more than is ever remembered
            k = torch.cat((self.keys[:, self.start : self.end], k), dim=1)
            v = torch.cat((self.values[:, self.start : self.end], v), dim=1)
            first = k.shape[1] - self.remembered
            self._restart(k[:, first:], v[:, first:])
            return k, v
        if self.end + new > self.keys.shape[1]:
            kept = slice(self.start, self.end)
            self._restart(self.keys[:, kept].clone(), self.values[:, kept].clone())
        self.keys[:, self.end : self.end + new] = k
        self.values[:, self.end : self.end + new] = v
        self.end += new
        seen = slice(self.start, self.end)
        self.start = max(self.start, self.end - self.remembered)
        return self.keys[:, seen], self.values[:, seen]

    def _restart(self, k: Tensor, v: Tensor) -> None:
        self.start, self.end = 0, k.shape[1]
        self.keys[:, : self.end] = k
        self.values[:, : self.end] = v


class KVCache:
    """Every layer's cache, for `batch` sequences of at most `capacity` tokens."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.layers: list[LayerCache] = []
        for kind in config.layer_types:
            window = config.window(kind)
            remembered = capacity if window is None else min(window - 1, capacity)
            room = min(capacity, 2 * remembered + 1)
            size = (batch, room, config.num_key_value_heads, config.head_dim)
            self.layers.append(
                LayerCache(torch.empty(size, device=device, dtype=dtype), remembered)
            )
        self.length = 0
        """Tokens seen so far: the position of the next one."""
