"""Key/value cache of every layer, for several texts of different lengths.

A sliding layer is a ring buffer of `window` slots: position p uses slot p mod window, so a token
overwrites the one that has just left its window. A full layer keeps all positions in a buffer that
grows by an eighth, which bounds both unused memory and copying.

    window 4, six tokens:    slot      0  1  2  3
                             position  4  5  2  3

A prompt is written in chunks (`extend`, through the decoder's own attention), then one token of
every text at a time (model/inference/decode.py). The reader chooses the memory layout of values.
Memory: see `cache_bytes` in counting.py.
"""

import torch
from torch import Tensor

from pretrain_cli.model.config import ModelConfig

CAPACITY_STEP = 256
"""Smallest number of positions by which a full layer's buffer grows."""


class LayerCache:
    """Keys and values of one layer, (B, Hkv, places, Dh) each.

    Unused places hold zeros: they are masked, but 0 · NaN would still be NaN. With `along_places`,
    values are stored transposed: consecutive places are adjacent in memory.
    """

    def __init__(self, keys: Tensor, window: int | None, *, along_places: bool = False) -> None:
        self.along_places = along_places
        self.keys, self.values = keys, self._empty_values(keys)
        self.window = window
        self.length = 0
        """Positions that `extend` has written, of every text."""
        self.ends: list[int] | None = None

    @property
    def places(self) -> int:
        return self.keys.shape[2]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append T positions to every text; return the earlier positions still visible, and these.
        (B, T, Hkv, Dh) -> (B, S, Hkv, Dh)."""
        past, new = self.length, k.shape[1]
        self.length += new
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, Hkv, T, Dh)
        if self.window is None:
            whole = slice(past + new)
            self.keys[:, :, past : past + new] = k
            self.values[:, :, past : past + new] = v
            return self.keys[:, :, whole].transpose(1, 2), self.values[:, :, whole].transpose(1, 2)
        seen = torch.arange(max(0, past - self.window + 1), past, device=k.device) % self.places
        seen_k = torch.cat((self.keys[:, :, seen], k), dim=2)
        seen_v = torch.cat((self.values[:, :, seen], v), dim=2)
        for row, end in enumerate(self.ends or [past + new] * len(k)):
            end = min(end, past + new)
            first = max(past, end - self.places)
            if first < end:  # padding must not overwrite the text's keys
                places = torch.arange(first, end, device=k.device) % self.places
                self.keys[row, :, places] = k[row, :, first - past : end - past]
                self.values[row, :, places] = v[row, :, first - past : end - past]
        return seen_k.transpose(1, 2), seen_v.transpose(1, 2)

    def grow(self, places: int) -> None:
        """Enlarge the buffer to this many places, keeping its contents."""
        old = self.keys, self.values
        self.keys = self.keys.new_zeros((*self.keys.shape[:2], places, self.keys.shape[3]))
        self.values = self._empty_values(self.keys)
        for new, kept in zip((self.keys, self.values), old, strict=True):
            new[:, :, : kept.shape[2]] = kept

    def _empty_values(self, keys: Tensor) -> Tensor:
        if self.along_places:
            return keys.new_zeros(keys.mT.shape).mT
        return torch.zeros_like(keys)


class KVCache:
    """Caches of all layers, for `batch` texts of at most `capacity` tokens.

    `ends` is where each text's prompt ends, if lengths differ: later positions are padding. `whole`
    allocates full layers completely at the start. `along_places`: see LayerCache.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        ends: list[int] | None = None,
        whole: bool = False,
        along_places: bool = False,
    ) -> None:
        self.capacity = capacity
        self.length = 0
        """Tokens given to the decoder so far: the position of the next one."""
        self.layers: list[LayerCache] = []
        for kind in config.layer_types:
            window = config.window(kind)
            places = min(capacity, CAPACITY_STEP) if window is None else min(capacity, window)
            if whole and window is None:
                places = capacity
            size = (batch, config.num_key_value_heads, places, config.head_dim)
            keys = torch.zeros(size, device=device, dtype=dtype)
            layer = LayerCache(keys, window, along_places=along_places)
            layer.ends = ends
            self.layers.append(layer)

    def reserve(self, length: int) -> None:
        """Make room for texts of this many tokens."""
        for layer in self.layers:
            if layer.window is None and layer.places < length:
                grown = layer.places + max(CAPACITY_STEP, layer.places // 8)
                wanted = -(-max(length, grown) // CAPACITY_STEP) * CAPACITY_STEP
                layer.grow(min(wanted, self.capacity))

    def take(self, row: int, other: "KVCache", other_row: int, length: int) -> None:
        """Fill row `row` with the `length` tokens of another cache."""
        self.reserve(length)
        for layer, source in zip(self.layers, other.layers, strict=True):
            kept = min(length, source.places, layer.places)
            layer.keys[row, :, :kept] = source.keys[other_row, :, :kept]
            layer.values[row, :, :kept] = source.values[other_row, :, :kept]

    @property
    def bytes(self) -> int:
        return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in self.layers)


def seen_places(positions: Tensor, places: int) -> Tensor:
    """Return the cache places that each text's current token sees, itself included. (B,) -> (B,
    places).

    Place s holds the last position up to p that maps to it, p − (p − s) mod places; if that is
    negative, the place was never written. This holds for a ring and for a buffer with one place per
    position.
    """
    place = torch.arange(places, device=positions.device)
    behind = (positions.unsqueeze(-1) - place) % places
    return behind <= positions.unsqueeze(-1)
