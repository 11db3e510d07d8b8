"""Estimate the memory of a training step, by part and by phase, from numbers alone: no torch, no
allocation. It chooses micro-batches and plans runs.

    forward ──────────── loss ── backward ───────────── gradients ── step
    activations grow     all,    all, and a block's     all, no      what the optimizer
                         logits  gradients on the way   activations  has beside them

A step's peak is at one of the last four: with many tokens at the first, with few at the last.

What autograd keeps of a block is counted tensor by tensor. What can't be derived is a constant,
measured, with its source.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.counting import (
    CHUNK_ELEMENTS,
    SOFTMAX_ELEMENTS,
    count_parameters,
    folds,
)

MOMENTS = ("loss", "backward", "gradients", "step")
PARTS = (
    "weights", "optimizer", "gradients", "copies", "activations", "masks", "logits", "gathered",
    "process", "lost",
)  # fmt: skip
USABLE_FRACTION = 0.9
"""Share of the available memory to use: the estimate may be a tenth short."""
PROCESS = 331_000_000
"""Resident on a CPU before a model is made: Python and the libraries."""
HEAP_OVERHEAD = {True: 0.2, False: 0.14}
"""Overhead of glibc's heap as a share of what a step allocates, by keep_freed_memory. Measured:
resident memory at its peak, less everything that is counted here
(tests/engine/planning/test_memory_estimate.py)."""
BACKWARD = 0.5
"""Gradients inside a block's backward pass, as a share of what the block kept. Measured by the same
test."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Inputs of the memory estimate. Speed fields hold their values in force."""

    model: ModelConfig
    seq_len: int
    micro_batch_size: int
    is_accumulated: bool = False
    """True if gradients of an earlier micro-step are accumulated."""
    document_mask: bool = False
    device: str
    """cpu, cuda or mps."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    parallel: Literal["alone", "ddp", "fsdp"] = "alone"
    ranks: int = 1
    dtype: str
    attention: str
    compile: bool
    recompute_cheap: bool
    merged_qkv: bool
    chunked_loss: bool
    activation_checkpointing: bool
    fused_optimizer: bool
    keep_freed_memory: bool

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation; with float8 activations are bfloat16."""
        return {"float32": 4, "bfloat16": 2, "float8": 2}[self.dtype]

    @property
    def tokens(self) -> int:
        return self.seq_len * self.micro_batch_size


SETTINGS = tuple(f.name for f in fields(StepShape) if f.name in SpeedConfig.model_fields)
"""Speed settings that memory depends on."""


def speed_settings(speed: Any) -> dict[str, Any]:
    """Those, of a Speed or a SpeedConfig."""
    return {setting: getattr(speed, setting) for setting in SETTINGS}


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part in each moment."""

    phases: dict[str, dict[str, int]]

    @property
    def moment(self) -> str:
        """The one with the most."""
        return max(self.phases, key=lambda moment: sum(self.phases[moment].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of the largest phase by part."""
        return self.phases[self.moment]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def most(self, part: str) -> int:
        """Return the largest size of a part over all phases."""
        return max(parts.get(part, 0) for parts in self.phases.values())


def estimate(t: StepShape) -> Estimate:
    """Estimate the memory of a step."""
    m, count, c = t.model, count_parameters(t.model), t.compute_bytes
    hidden, depth = t.tokens * m.hidden_size, m.num_hidden_layers
    kept = [kept_by_block(t, layer) for layer in range(depth)]
    weights, head = 4 * count.total, 4 * m.vocab_size * m.hidden_size
    matrices = count.attention + count.mlp
    moments = 4 if t.optimizer == "muon" else 8
    ranks = t.ranks if t.parallel == "fsdp" else 1
    # DDP has all gradients in buckets of its own from the start
    earlier = weights if t.is_accumulated or t.parallel == "ddp" else 0
    copies = 2 * matrices if c == 2 and not t.recompute_cheap else 0
    # Beside the blocks' own: what the last norm keeps, and the loss's gradient. The sum is counted
    # to the byte against autograd in tests/engine/planning/test_memory_estimate.py.
    activations = sum(kept) + (8 + c) * hidden
    if t.activation_checkpointing:  # a block's input alone; one block at a time has the rest
        activations += c * hidden * depth + max(kept) - sum(kept)
        copies //= depth
    # On a CPU the embedding's gradient is added to the head's, in its place.
    on_gpu = t.device != "cpu"
    apart = head if m.tie_word_embeddings and (on_gpu or not t.chunked_loss) else 0
    last = earlier + head if earlier else weights // ranks

    always = {
        "weights": weights // ranks,
        "optimizer": (moments * matrices + 8 * (count.total - matrices)) // ranks,
        "process": 0 if on_gpu else PROCESS,
    }
    root, block = (0, 0) if ranks == 1 else (weights - 4 * matrices, 4 * matrices // depth)
    estimate = Estimate(
        {
            "loss": always
            | {
                "gradients": earlier + head,
                "copies": copies + (head // 2 if c == 2 else 0),
                "activations": activations,
                "masks": masks_bytes(t),
                "logits": logits_bytes(t),
                "gathered": root,
            },
            "backward": always
            | {
                "gradients": earlier + head * (2 if on_gpu else 1),
                "copies": copies,
                "activations": activations + round(BACKWARD * max(kept)),
                "masks": masks_bytes(t),
                "gathered": root + 4 * block,  # two blocks, and the gradients of two
            },
            "gradients": always
            | {
                "gradients": last + apart,
                "activations": 8 * hidden,
                "gathered": 2 * root,
            },
            "step": always | {"gradients": weights // ranks},
        }
    )
    share = 0 if on_gpu else HEAP_OVERHEAD[t.keep_freed_memory]
    for parts in estimate.phases.values():
        parts["lost"] = round(share * sum(n for name, n in parts.items() if name not in always))
    return estimate


def largest(bytes_of: Callable[[int], int], room: float) -> int:
    """The largest micro-batch that takes no more than the room; 0 where none does."""
    if bytes_of(1) > room:
        return 0
    low = 1
    while bytes_of(2 * low) <= room:
        low *= 2
    high = 2 * low  # too large
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= room else (low, middle)
    return low


def logits_bytes(t: StepShape) -> int:
    """Return the bytes of logits that the loss holds at once."""
    V, c = t.model.vocab_size, t.compute_bytes
    if not t.chunked_loss:
        return 12 * t.tokens * V  # in float32 with their softmax's and their own gradient
    rows = min(t.tokens, max(1, CHUNK_ELEMENTS.get(t.device, CHUNK_ELEMENTS["cpu"]) // V))
    wide = 0 if c == 4 else rows * V if t.device != "cpu" else min(rows * V, SOFTMAX_ELEMENTS)
    return rows * V * c + 4 * wide  # in float32: on a CPU of a few rows


def masks_bytes(t: StepShape) -> int:
    """Attention masks that all layers of a kind share, made anew for each micro-batch. Blocks have
    none; flex's are of whole blocks."""
    if t.attention not in ("eager", "sdpa"):
        return 0
    each = _sdpa_mask if t.attention == "sdpa" else _eager_mask
    return sum(each(t, t.model.window(kind)) for kind in set(t.model.layer_types))


def _sdpa_mask(t: StepShape, window: int | None) -> int:
    T, rows = t.seq_len, t.micro_batch_size
    if window is None or window >= T:
        return t.compute_bytes * rows * T**2 if t.document_mask else 0
    block, blocks = folds(T, window)
    of_block = block * (window + block)
    seen = rows * (window**2 + blocks * of_block) if t.document_mask else of_block
    return t.compute_bytes * seen


def _eager_mask(t: StepShape, window: int | None) -> int:
    """Every layer keeps one of its own, unless all is made again."""
    rows = t.micro_batch_size if t.document_mask else 1
    return rows * t.seq_len**2 if t.activation_checkpointing else 0


# --- what autograd keeps -------------------------------------------------------------------------


def kept_by_block(t: StepShape, layer: int) -> int:
    """Bytes that a block keeps of a micro-batch for its backward pass, copies of weights aside."""
    m, c = t.model, t.compute_bytes
    D, H, Hkv = m.hidden_size, m.num_attention_heads, m.num_key_value_heads
    q, kv = H * m.head_dim, Hkv * m.head_dim
    norms = 4 if m.has_post_norms else 2
    scales = 4 * (norms + H + Hkv)  # 1 / root mean square, of every norm
    mlp = _kept_by_mlp(t, layer)
    if t.compile:
        # What products give and, where that isn't made again, take.
        hidden = (1 if m.has_post_norms else 0) + (2 if t.recompute_cheap else 4)
        values = 2 if t.attention == "blocks" else 1  # laid out anew
        return t.tokens * (c * (hidden * D + 3 * q + (2 + values) * kv) + mlp + scales)
    normed = 4 if m.norm_is_zero_centered else c  # before it is scaled by the norm's weight
    a_token = 2 * (4 + normed + c) * D  # in float32, normed, and as the next product takes it
    a_token += (norms - 2) * (4 + normed) * D
    a_token += (normed + (4 if c < 4 else 0)) * (q + kv)  # in float32 a view of the product
    return round(t.tokens * (a_token + _kept_by_attention(t, layer) + mlp + scales))


def _kept_by_attention(t: StepShape, layer: int) -> float:
    """Bytes a token, from the queries and keys that are turned to what attention gives."""
    m, c, T = t.model, t.compute_bytes, t.seq_len
    q, kv = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
    kept = 2 * c * q  # queries, and attended
    of_product = q + kv if c == 4 else 0  # what norms have views of
    if t.attention == "eager":
        # keys and values repeated for every head, weights also in float32, the mask
        kept += 2 * c * q + m.num_attention_heads * T * (4 if c == 4 else 6)
        kept += T if t.document_mask else T / t.micro_batch_size
        values = kv if t.merged_qkv and of_product else 0
        return kept + c * (of_product + values)
    kept += c * kv
    if t.attention == "blocks":  # values are laid out anew
        return kept + c * (kv + of_product + (kv if of_product and t.merged_qkv else 0))
    if t.attention in ("sdpa", "flex"):
        kept += 4 * m.num_attention_heads  # log Σ exp
    window = m.window(m.layer_types[layer])
    if t.attention == "sdpa" and window is not None and window < T:
        # folded: attended in two parts; queries, keys and values behind the first block anew
        block, blocks = folds(T, window)
        kept += c * (q + blocks / T * (block * q + (window + block) * 2 * kv))
    return kept + c * (q + 2 * kv if t.merged_qkv else of_product + kv)  # values are a view


def _kept_by_mlp(t: StepShape, layer: int) -> int:
    """Bytes a token."""
    m, c = t.model, t.compute_bytes
    if not m.is_sparse(layer):
        # gate and up; activated, and their product, where they are not made again
        return (2 if t.recompute_cheap else 3 if t.compile else 4) * c * m.intermediate_size
    K, E = m.num_experts_per_tok, m.num_experts
    return (
        c * K * (3 * m.hidden_size + 4 * m.moe_intermediate_size) + 4 * E + 32 * K
    )  # 32 K: indices, order and weights of the K chosen experts
