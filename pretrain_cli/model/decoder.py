"""The decoder of both families; their differences are fields of ModelConfig.

Shapes, here and everywhere: B batch, T queries, S keys, D hidden_size, H heads, Hkv key/value
heads, Dh head_dim, F intermediate_size, V vocab_size.

    tokens (B, T) ── embedding ── Block × L ── norm ── head ── logits (B, T, V), or the loss

Sublayers compute in `dtype`; parameters keep their stored type (float32 when training).
"""

import hashlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as autograd_config
from torch.utils.checkpoint import checkpoint

from pretrain_cli.model.attention import Attention
from pretrain_cli.model.attention_backends.backends import BACKENDS
from pretrain_cli.model.attention_backends.mask import Documents, Mask
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.kv_cache import KVCache, LayerCache
from pretrain_cli.model.layers import GatedMLP, Linear, RMSNorm, lookup
from pretrain_cli.model.loss import Softmax, softmax_, with_z_loss
from pretrain_cli.model.moe import MixtureOfExperts, balancing_loss
from pretrain_cli.model.parameter_map import EMBEDDING, Merged, PublishedTensor, parameter_map
from pretrain_cli.model.rope import rope_table
from pretrain_cli.spans import span
from pretrain_cli.targets import IGNORE_INDEX


class Block(nn.Module):
    """x + post_norm(sublayer(pre_norm(x))), for attention and then for the MLP.

    (B, T, D) -> (B, T, D), and the expert use of the tokens in `counted` (see moe.py). Without
    post-norms (Qwen 3) post_norm is the identity.
    """

    def __init__(self, config: ModelConfig, layer: int, attention: str, merged: Merged) -> None:
        super().__init__()
        D = config.hidden_size
        self.attention_norm = RMSNorm(D, config)
        self.attention = Attention(config, BACKENDS[attention], merged=merged.qkv)
        self.mlp_norm = RMSNorm(D, config)
        if config.is_sparse(layer):
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = GatedMLP(config, merged=merged.gate_up)
        self.post_attention_norm = RMSNorm(D, config) if config.has_post_norms else nn.Identity()
        self.post_mlp_norm = RMSNorm(D, config) if config.has_post_norms else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Any,
        cache: LayerCache | None = None,
        counted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        attended = self.attention(self.attention_norm(x), rope, mask, cache)
        x = x + self.post_attention_norm(attended)
        if isinstance(self.mlp, MixtureOfExperts):
            out, use = self.mlp(self.mlp_norm(x), counted)
        else:
            out, use = self.mlp(self.mlp_norm(x)), None
        return x + self.post_mlp_norm(out), use


class LossWeights(NamedTuple):
    """Weights of the auxiliary losses; 0 disables one."""

    z_loss: float
    balancing: float


class LossParts(NamedTuple):
    """The loss to minimize, which has gradients, and its parts, which have none. Float32."""

    minimized: Tensor
    """Sum of the three below."""
    cross_entropy: Tensor
    z_loss: Tensor
    balancing: Tensor
    choices: Tensor | None
    """Number of times each expert of each sparse layer was chosen, (layers, E); None in a dense
    model, and without loss weights."""


class Decoder(nn.Module):
    """A Gemma 3 or Qwen 3 language model.

    `attention` names a backend; `dtype` is the type of activations and matrix products. Neither
    these nor the three switches change what is computed, apart from rounding, time and memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        attention: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        merged: Merged = Merged(),
        chunked_loss: bool | str = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.backend = BACKENDS[attention]
        self.merged = merged
        self.chunked_loss = chunked_loss
        self.activation_checkpointing = activation_checkpointing
        self.softmax: Softmax = softmax_
        self.has_cuda_graphs = False
        self.embedding = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.blocks = nn.ModuleList(
            Block(config, layer, attention, merged) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config)
        if not config.tie_word_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.config.tie_word_embeddings else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | Documents | None = None,
        normalizer: float | None = None,
        loss_weights: LossWeights | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor | LossParts:
        """Return the logits of tokens (B, T): (B, T, V) in the compute type, or (B, 1, V) with
        `last_only`. With `targets` (B, T), return the loss as LossParts instead.

        `documents` (B, T) are numbers that keep attention inside each document. Positions do not
        restart at a document: in both families only their differences matter (RoPE), so the logits
        of a document equal those it has alone, up to rounding. As `Documents` they come with the
        number in each row; without it, `varlen` attention waits for the GPU to count them.

        With a cache, tokens continue the cached sequence; there are no targets then. `normalizer`:
        see `cross_entropy`. With `loss_weights`, the loss includes the auxiliary losses.
        """
        if isinstance(documents, Tensor):
            documents = Documents(documents)
        if targets is not None:
            assert cache is None, "a loss is of whole sequences"
            return self._loss(tokens, targets, documents, normalizer, loss_weights)
        hidden = self._hidden_and_use(tokens, cache, documents)[0]
        if last_only:
            hidden = hidden[:, -1:]
        return F.linear(hidden, self.head_weight.to(hidden.dtype))

    def _loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        documents: Documents | None,
        normalizer: float | None,
        weights: LossWeights | None,
    ) -> LossParts:
        """Return the loss. The balancing loss is that of these tokens, weighted by their share of
        `normalizer`."""
        counted = None if weights is None else targets != IGNORE_INDEX
        waiting = self._place_for_the_gradient(tokens)
        hidden, uses = self._hidden_and_use(tokens, None, documents, counted, waiting)
        with span("loss"):
            loss = with_z_loss(
                hidden,
                self.head_weight,
                targets,
                normalizer=normalizer,
                chunked=self.chunked_loss,
                z_loss=weights.z_loss if weights else 0.0,
                softmax=self.softmax,
                waiting=waiting,
            )
        if weights is None or counted is None:
            return LossParts(*loss, balancing=loss.z_loss, choices=None)  # which is zero
        if not uses:
            return LossParts(*loss, balancing=torch.zeros_like(loss.z_loss), choices=None)
        use = torch.stack(uses)
        share = 1.0 if normalizer is None else counted.sum() / normalizer
        balancing = weights.balancing * share * balancing_loss(use, counted)
        return LossParts(
            loss.minimized + balancing,
            loss.cross_entropy,
            loss.z_loss,
            balancing.detach(),
            use[:, 0].detach(),
        )

    def _place_for_the_gradient(self, tokens: Tensor) -> list[Tensor] | None:
        """Return a list through which the head's gradient reaches the embedding, if they are tied;
        see `lookup`. None on a GPU: the second gradient does not raise the peak, which is in the
        loss, and autograd's own kernel is deterministic."""
        tied = self.config.tie_word_embeddings and self.chunked_loss is True
        return [] if tied and tokens.device.type == "cpu" and torch.is_grad_enabled() else None

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the normalized hidden states of the last layer. (B, T) -> (B, T, D)."""
        return self._hidden_and_use(tokens, cache)[0]

    def _hidden_and_use(
        self,
        tokens: Tensor,
        cache: KVCache | None,
        documents: Documents | None = None,
        counted: Tensor | None = None,
        waiting: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return hidden states and, with `counted` (B, T), the expert use of these tokens in each
        sparse layer."""
        assert cache is None or documents is None, "a cache remembers no documents"
        if self.has_cuda_graphs:  # the next replays may overwrite what the last ones returned
            torch.compiler.cudagraph_mark_step_begin()
        T, device = tokens.shape[1], tokens.device
        past = cache.length if cache else 0
        positions = torch.arange(past, past + T, device=device)
        ropes, masks = {}, {}
        for kind in set(self.config.layer_types):
            base, factor = self.config.rope_base(kind)
            ropes[kind] = rope_table(
                positions, self.config.head_dim, base=base, factor=factor, dtype=self.dtype
            )
            window = self.config.window(kind)
            remembered = past if window is None else min(past, window - 1)
            mask = Mask(T, remembered + T, window, documents, rows=len(tokens))
            masks[kind] = self.backend.lower(mask, device, self.dtype)

        x, uses = self.embed(tokens, waiting), []
        for layer, block in enumerate(self.blocks):
            kind = self.config.layer_types[layer]
            layer_cache = cache.layers[layer] if cache else None
            inputs = (x, ropes[kind], masks[kind], layer_cache, counted)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, use = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x, use = block(*inputs)
            if use is not None:
                uses.append(use)
        if cache:
            cache.length += T
        return self.norm(x), uses

    def compile_parts(self, *, recompute_cheap: bool, cuda_graphs: bool = False) -> None:
        """Compile each block in place, and the softmax of the loss.

        Blocks of a kind share one compiled graph, so compile time is that of one or two blocks at
        any depth; only a few large products stay uncompiled. With `recompute_cheap` the backward
        pass recomputes norms, rotations and other cheap operations, fused into their consumers.
        This is a setting of the whole process.

        With `cuda_graphs` PyTorch records each block's kernels and replays them: a graph for every
        block, forward and backward, in one pool of memory. A replay overwrites what the one before
        returned, gradients included, so parameters need gradients to add to (see `add_gradients`).
        """
        for name in ("materialized_backward", "used_far_apart", "long_fusible_chains"):
            setattr(autograd_config, f"ban_recompute_{name}", not recompute_cheap)
        for block in self.blocks:
            block.compile(dynamic=False, mode="reduce-overhead" if cuda_graphs else None)
        self.has_cuda_graphs = cuda_graphs
        self.softmax = torch.compile(softmax_)

    def embed(self, tokens: Tensor, waiting: list[Tensor] | None = None) -> Tensor:
        """Embed tokens. (B, T) -> (B, T, D). The scale is rounded to the type of the weights, as
        published."""
        x = self.embedding(tokens) if waiting is None else lookup(tokens, self.embedding, waiting)
        if self.config.embedding_is_scaled:
            x = x * torch.tensor(math.sqrt(self.config.hidden_size), dtype=x.dtype).item()
        return x.to(self.dtype)

    @torch.no_grad()
    def initialize(self, seed: int, *, how: str = "normal") -> None:
        """Draw all weights from a seed; the result is the same for merged and separate projections,
        on any device and number of ranks. `how`: see `draw`."""
        parameters = dict(self.named_parameters())
        for piece in parameter_map(self.config, merged=self.merged):
            piece.of(parameters[piece.parameter]).copy_(draw(self.config, piece, seed, how=how))


def draw(config: ModelConfig, piece: PublishedTensor, seed: int, *, how: str = "normal") -> Tensor:
    """Draw the initial value of a published tensor.

    | matrices, embedding, router, experts | normal, of the standard deviation below |
    | norms                                | one: stored as 0 where zero-centered    |
    | the padding token's embedding        | zero                                    |

    Each tensor has its own generator, seeded by the tensor's name.
    """
    if piece.is_norm:
        return torch.full(piece.shape, 0.0 if config.norm_is_zero_centered else 1.0)
    name_seed = hashlib.sha256(f"{seed} {piece.name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(name_seed, "little"))
    deviation = initial_deviation(config, piece, how)
    values = torch.randn(piece.shape, generator=generator) * deviation
    if piece.name == EMBEDDING and config.pad_token_id is not None:
        values[config.pad_token_id] = 0.0
    return values


MLP_DEVIATION = 0.4
"""Factor on the standard deviation of an MLP's first matrices, as in nanochat."""


def initial_deviation(config: ModelConfig, piece: PublishedTensor, how: str) -> float:
    """Return the standard deviation of a matrix: initializer_range, except for matrices of layers.

    | how    | q, k, v     | gate, up      | o, down: added to the residual stream |
    |--------|-------------|---------------|---------------------------------------|
    | normal | as all      | as all        | as all                                |
    | gpt2   | as all      | as all        | initializer_range / √(2 layers)       |
    | width  | 1/√columns  | 0.4/√columns  | 0: each layer starts as the identity  |

    With `width`, activations inside a layer do not grow with the width of the model, and nothing is
    added to the residual stream until the first step has told what to add.
    """
    kind = piece.name.removesuffix(".weight").rpartition(".")[2]
    if kind in ("o_proj", "down_proj"):
        scaled = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        return {"normal": config.initializer_range, "gpt2": scaled, "width": 0.0}[how]
    if how == "width" and kind in ("q_proj", "k_proj", "v_proj"):
        return 1 / math.sqrt(piece.shape[-1])
    if how == "width" and kind in ("gate_proj", "up_proj"):
        return MLP_DEVIATION / math.sqrt(piece.shape[-1])
    return config.initializer_range
