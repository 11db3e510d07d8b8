"""Grouped-query attention with normalized queries and keys and rotary positions, for both
families."""

from typing import Any

from torch import Tensor, nn

from pretrain_cli.model.attention_backends.backend import Backend
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.kv_cache import LayerCache
from pretrain_cli.model.layers import Linear, Projections, RMSNorm
from pretrain_cli.model.rope import rotate


class Attention(nn.Module):
    """Grouped-query attention. (B, T, D) -> (B, T, D).

    q and k are normalized over Dh, with one weight vector for all heads, before RoPE.
    """

    def __init__(self, config: ModelConfig, backend: Backend, *, merged: bool) -> None:
        super().__init__()
        D, self.head_dim = config.hidden_size, config.head_dim
        q = config.num_attention_heads * self.head_dim
        kv = config.num_key_value_heads * self.head_dim
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv = Projections(D, rows, merged=merged)
        self.q_norm = RMSNorm(self.head_dim, config)
        self.k_norm = RMSNorm(self.head_dim, config)
        self.output = Linear(q, D)
        self.scale = config.attention_scale
        self.attend = backend.attend

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Any, cache: LayerCache | None
    ) -> Tensor:
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)) for p in self.qkv(x))  # (B, T, heads, Dh)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, S, Hkv, Dh)
        return self.output(self.attend(q, k, v, mask, self.scale).flatten(2))
