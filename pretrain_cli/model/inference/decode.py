"""Decoding: prompts in chunks, then one token of every text at a time.

A prompt goes through the decoder and its attention backend in chunks, without T × T scores and
without logits but the last. Each following step has a fixed shape: one token for each of B texts,
each at its own position. On a GPU torch.compile makes one graph of a step. On a CPU it compiles one
block, shared by all blocks of its kind: as fast there, with the compile time of one or two blocks
instead of the whole depth.

Shapes as in decoder.py; T is 1 and left out, so x is (B, D) and q (B, H, Dh).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.inference.cpu_linear import faster_linear, replace_matrices, written_down
from pretrain_cli.model.inference.int8 import is_quantized
from pretrain_cli.model.kv_cache import KVCache, seen_places
from pretrain_cli.model.rope import rope_table, rotate

CHUNK = 512
"""Tokens, summed over all prompts, that go through the decoder at once."""

Head = Callable[[Tensor], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""(q (B, H, Dh), keys and values (B, Hkv, places, Dh), additive mask (B, 1, 1, places), scale) ->
(B, H, Dh). Heads that share keys are treated as queries of one head: (B, Hkv, G, Dh)."""


class Parts(NamedTuple):
    """Functions that a decoding step calls, plain or compiled."""

    block: Callable[..., Tensor]
    logits: Callable[..., Tensor]
    attend: Attend
    apart: bool = False
    """True if each function is compiled separately."""


class DecodeSession:
    """A decoder prepared to generate text.

    With `fast` on a CPU, its matrices are replaced by ones suited to `rows` texts at a time, if
    known (see cpu_linear.py); the decoder can then no longer be used for anything else. With
    `compiled`, the first step compiles.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        fast: bool = False,
        compiled: bool = False,
        rows: int | None = None,
    ) -> None:
        self.model = model
        self.device = model.embedding.weight.device
        self.on_gpu_graph = compiled and self.device.type == "cuda"
        self.by_sums = compiled and self.device.type == "cpu"
        self.head: Head = lambda x: F.linear(x, model.head_weight.to(x.dtype))
        if is_quantized(model):
            self.head, fast = model.head, False
        linear = faster_linear(self.device, rows, compiled) if fast else None
        if linear is not None:
            self.head = linear(model.head_weight.to(model.dtype))
            replace_matrices(model, lambda weight: linear(weight.to(model.dtype)))
        self._step = step
        self._parts = Parts(_block, _logits, attend)
        if self.by_sums:
            block, logits = (torch.compile(part, fullgraph=True) for part in (_block, _logits))
            self._parts = Parts(block, logits, attend_by_sums, apart=True)
        elif compiled:
            mode = "reduce-overhead" if self.on_gpu_graph else None
            self._step = torch.compile(step, fullgraph=True, mode=mode)

    def new_cache(self, *, batch: int, capacity: int, ends: list[int] | None = None) -> KVCache:
        cache = KVCache(
            self.model.config,
            batch=batch,
            capacity=capacity,
            device=self.device,
            dtype=self.model.dtype,
            ends=ends,
            whole=self.on_gpu_graph,  # the graph holds the buffers' addresses
            along_places=self.by_sums and ends is None,
        )
        if self.on_gpu_graph:
            for layer in cache.layers:
                for buffer in (layer.keys, layer.values):
                    torch._dynamo.mark_static_address(buffer, guard=False)  # pyright: ignore
        return cache

    @torch.no_grad()
    def prefill(self, cache: KVCache, prompts: list[list[int]]) -> Tensor:
        """Write prompts into a new cache; return the logits after each one's last token. -> (B,
        V)."""
        longest = max(map(len, prompts))
        padded = [ids + [0] * (longest - len(ids)) for ids in prompts]
        cache.reserve(longest)
        last: list[Tensor] = [torch.empty(0)] * len(prompts)
        tokens = torch.tensor(padded, device=self.device)
        for chunk in tokens.split(max(1, CHUNK // len(prompts)), dim=1):
            past = cache.length
            hidden = self.model.hidden(chunk, cache)
            for row, ids in enumerate(prompts):
                if past < len(ids) <= cache.length:
                    last[row] = hidden[row, len(ids) - 1 - past]
        return self.head(torch.stack(last))

    def warm_up(self, *, rows: int, capacity: int) -> None:
        """Compile by running a step on a temporary cache."""
        cache = self.new_cache(batch=rows, capacity=capacity)
        for layer in cache.layers:
            if layer.window is None and not self.on_gpu_graph:
                for buffer in (layer.keys, layer.values):  # growing must not recompile
                    torch._dynamo.mark_dynamic(buffer, 2)  # pyright: ignore
        tokens, positions = torch.zeros(2, rows, dtype=torch.long, device=self.device).unbind()
        for _ in range(3 if self.on_gpu_graph else 1):  # the second run records the graph
            self.step(cache, tokens.clone(), positions.clone())

    @torch.no_grad()
    def step(self, cache: KVCache, tokens: Tensor, positions: Tensor) -> Tensor:
        """Write each text's newest token to its place and return the logits after it. tokens,
        positions (B,) -> (B, V)."""
        keys = [layer.keys for layer in cache.layers]
        values = [layer.values for layer in cache.layers]
        if self.on_gpu_graph:
            torch.compiler.cudagraph_mark_step_begin()
        return self._step(self.model, self.head, self._parts, keys, values, tokens, positions)


def step(
    model: Decoder,
    head: Head,
    parts: Parts,
    keys: list[Tensor],
    values: list[Tensor],
    tokens: Tensor,
    positions: Tensor,
) -> Tensor:
    """keys, values: of each layer, (B, Hkv, places, Dh)."""
    config = model.config
    kinds = {}
    for kind in dict.fromkeys(config.layer_types):
        places = keys[config.layer_types.index(kind)].shape[2]
        base, factor = config.rope_base(kind)
        rope = rope_table(positions, config.head_dim, base=base, factor=factor, dtype=model.dtype)
        seen = seen_places(positions, places)
        hidden = torch.zeros_like(seen, dtype=model.dtype).masked_fill(~seen, float("-inf"))
        mask = hidden[:, None, None]
        if parts.apart and config.window(kind) is None:
            # grows as keys and values do: see warm_up
            torch._dynamo.maybe_mark_dynamic(mask, 3)  # pyright: ignore
        kinds[kind] = rope, mask, positions % places
    x = model.embed(tokens)
    for layer, block in enumerate(model.blocks):
        rope, mask, place = kinds[config.layer_types[layer]]
        x = parts.block(block, parts.attend, x, rope, mask, place, keys[layer], values[layer])
    return parts.logits(head, model.norm, x)


def _logits(head: Head, norm: nn.Module, x: Tensor) -> Tensor:
    return head(norm(x))


def _block(
    block: Any,
    attend: Attend,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    mask: Tensor,
    place: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Compute a Block for one token of each text. (B, D) -> (B, D)."""
    attention = block.attention
    parts = attention.qkv(block.attention_norm(x))
    q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in parts)  # (B, heads, Dh)
    q, k = rotate(attention.q_norm(q), rope), rotate(attention.k_norm(k), rope)
    text = torch.arange(len(x), device=x.device)
    keys[text, :, place] = k
    values[text, :, place] = v
    attended = attend(q, keys, values, mask, attention.scale).flatten(1)
    x = x + block.post_attention_norm(attention.output(attended))
    out = block.mlp(block.mlp_norm(x))
    return x + block.post_mlp_norm(out[0] if isinstance(out, tuple) else out)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend with one fused kernel that reads the keys once. In bfloat16 on a CPU it is several
    times as fast as `enable_gqa`. Equally fast but with more operations: two matrix products with a
    softmax between."""
    grouped = q.unflatten(1, (keys.shape[1], -1))
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.flatten(1, 2)


def attend_by_sums(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend by sums along each key, and along the places of each value component, which must be
    contiguous (`along_places`). For a compiled step on a CPU."""
    grouped = q.unflatten(1, (keys.shape[1], -1))
    scores = _sums(grouped, keys) * scale + mask
    return _sums(scores.softmax(-1), values.mT).to(q.dtype).flatten(1, 2)


def _sums(some: Tensor, rows: Tensor) -> Tensor:
    """Return some @ rows^T in float32: (B, Hkv, G, N), (B, Hkv, M, N) -> (B, Hkv, G, M). All G sums
    share one loop, which reads the rows once. (`written_down`: see cpu_linear.py.)"""
    some, wide = written_down(some).float(), rows.float()
    return torch.stack([(wide * one.unsqueeze(-2)).sum(-1) for one in some.unbind(2)], dim=2)
