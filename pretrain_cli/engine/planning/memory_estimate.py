"""Estimate the memory of a training step, by part and by phase.

It is arithmetic on the config: no torch, no allocation. The results choose micro-batches and plan
runs. Live memory in each phase, besides weights and optimizer state:

    forward ──────────── loss ────────── backward ──────── gradients ───── step
    activations grow     all             all activations,  all gradients,  all gradients
                         activations,    gradients inside  no activations
                         logits          one block

The peak is in one of the last four phases: in `loss` with many tokens, in `step` with few.

The activations that autograd keeps for a block are counted tensor by tensor. Quantities that can't
be derived are measured constants, each with its source.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.optim.kinds import OPTIMIZERS
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.counting import (
    SOFTMAX_ELEMENTS,
    count_parameters,
    folds,
    loss_chunk_rows,
)

PHASES = ("loss", "backward", "gradients", "step")
PARTS = (
    "weights", "optimizer", "gradients", "copies", "activations", "masks", "logits", "gathered",
    "process", "lost",
)  # fmt: skip
USABLE_FRACTION = 0.9
"""Share of the available memory to use: the estimate may be a tenth short."""
PROCESS = 331_000_000
"""Resident bytes of a CPU process before a model is built: Python and the libraries."""
CUDA_CONTEXT = 500_000_000
"""Bytes of a GPU that PyTorch's allocator can't have: driver state and loaded kernels. Usual on an
H100 with kernels loaded when first called; not measured on a GPU by this project."""
CUBLAS_WORKSPACES = 2 * 32 * 2**20
"""Bytes of cuBLAS's workspaces: 32 MiB on Hopper (8 MiB on others), by the default of
CUBLAS_WORKSPACE_CONFIG in PyTorch, for each thread that multiplies on a stream: the one of the
forward pass, and autograd's. Seen in the allocator's figures on the null GPU, not on a real one."""
ALLOCATOR_PAGES = (2 + 20) * 2**20
"""Bytes that PyTorch's allocator holds and doesn't use: it grows memory for small tensors by 2 MiB
and for large ones by 20 MiB, and one of each is partly empty. Each tensor is rounded up to 512
bytes, which is nothing beside it. Not measured on a GPU."""
HEAP_OVERHEAD = {2: {True: 0.2, False: 0.14}, 4: {True: 0.4, False: 0.3}}
"""Overhead of glibc's heap as a share of what a step allocates, by bytes of the compute type and
keep_freed_memory.

Measured as peak resident memory minus everything that this module counts, in bfloat16 on a CPU that
has it in hardware, in float32 on one with AVX2: six shapes there gave 0.32 to 0.56
(tests/engine/planning/test_memory_estimate.py)."""
BACKWARD = 0.5
"""Bytes of gradients inside a block's backward pass, as a share of the block's saved activations.
Measured by the same test."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Inputs of the memory estimate. Speed fields hold their resolved values."""

    model: ModelConfig
    seq_len: int
    micro_batch_size: int
    is_accumulated: bool = False
    """True if a step has several micro-batches, whose gradients are accumulated."""
    document_mask: bool = False
    device: str
    """cpu, cuda or mps."""
    optimizer: str = "adamw"
    parallel: Literal["alone", "ddp", "fsdp"] = "alone"
    ranks: int = 1
    dtype: str
    attention: str
    compile: bool
    cuda_graphs: bool
    recompute_cheap: bool
    merged_qkv: bool
    chunked_loss: bool
    activation_checkpointing: bool
    fused_optimizer: bool
    keep_freed_memory: bool

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of an activation; with float8, activations are bfloat16."""
        return {"float32": 4, "bfloat16": 2, "float8": 2}[self.dtype]

    @property
    def tokens(self) -> int:
        return self.seq_len * self.micro_batch_size


SETTINGS = tuple(f.name for f in fields(StepShape) if f.name in SpeedConfig.model_fields)
"""Speed settings that memory depends on."""


def speed_settings(speed: Any) -> dict[str, Any]:
    """Return the speed settings that memory depends on, from a Speed or a SpeedConfig."""
    return {setting: getattr(speed, setting) for setting in SETTINGS}


@dataclass(frozen=True)
class Estimate:
    """Estimated bytes of each part in each phase."""

    phases: dict[str, dict[str, int]]

    @property
    def phase(self) -> str:
        """Phase with the largest total."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of the largest phase by part."""
        return self.phases[self.phase]

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
    moments = 4 * len(OPTIMIZERS[t.optimizer].matrix_state)
    ranks = t.ranks if t.parallel == "fsdp" else 1
    # DDP allocates buckets for all gradients before the first backward pass; CUDA graphs need them
    has_earlier = t.is_accumulated or t.parallel == "ddp" or t.cuda_graphs
    earlier = weights if has_earlier else 0
    copies = 2 * matrices if c == 2 and not t.recompute_cheap else 0
    # Outside the blocks: activations of the last norm, and the loss's gradient. A test compares the
    # sum with autograd to the byte (tests/engine/planning/test_memory_estimate.py).
    activations = sum(kept) + (8 + c) * hidden
    if t.activation_checkpointing:  # every block keeps its input; one at a time holds the rest
        activations += c * hidden * depth + max(kept) - sum(kept)
        copies //= depth
    # On a CPU with the chunked loss, a tied embedding's gradient is added to the head's in place.
    on_gpu = t.device != "cpu"
    apart = head if m.tie_word_embeddings and (on_gpu or not t.chunked_loss) else 0
    last = earlier + head if earlier else weights // ranks

    always = {
        "weights": weights // ranks,
        "optimizer": (moments * matrices + 8 * (count.total - matrices)) // ranks,
        "process": _process_bytes(t.device),
    }
    root, block = (0, 0) if ranks == 1 else (weights - 4 * matrices, 4 * matrices // depth)
    two_blocks = 4 * block  # weights and gradients of two blocks
    if c == 2 and ranks > 1:  # gathered in bfloat16; the gradients of one are summed in float32
        copies, two_blocks = 0, 3 * block
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
                "gathered": root + two_blocks,
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
    share = 0 if on_gpu else HEAP_OVERHEAD[c][t.keep_freed_memory]
    for parts in estimate.phases.values():
        parts["lost"] = round(share * sum(n for name, n in parts.items() if name not in always))
    return estimate


def _process_bytes(device: str) -> int:
    """Return the bytes that the program and its libraries take on the device."""
    return {"cpu": PROCESS, "cuda": CUBLAS_WORKSPACES + ALLOCATOR_PAGES}.get(device, 0)


def largest(bytes_of: Callable[[int], int], room: float) -> int:
    """Return the largest micro-batch that takes at most `room` bytes; 0 if none does."""
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
        return 12 * t.tokens * V  # float32: logits, their softmax, their gradient
    elements = loss_chunk_rows(t.tokens, V, t.device) * V
    # In float32 besides: a few rows on a CPU, none in the kernel for CUDA.
    wide = {"cpu": min(elements, SOFTMAX_ELEMENTS), "cuda": 0}.get(t.device, elements)
    return elements * c + (0 if c == 4 else 4 * wide)


def masks_bytes(t: StepShape) -> int:
    """Return the bytes of attention masks. All layers of a kind share one, rebuilt for each
    micro-batch."""
    mask = ATTENTION[t.attention].mask
    return sum(mask(t, t.model.window(kind)) for kind in set(t.model.layer_types))


def _no_mask(t: StepShape, window: int | None) -> int:
    """Return 0: `blocks` has no mask; `flex` has an entry for a whole block, which isn't
    counted."""
    return 0


def _sdpa_mask(t: StepShape, window: int | None) -> int:
    T, rows = t.seq_len, t.micro_batch_size
    if window is None or window >= T:
        return t.compute_bytes * rows * T**2 if t.document_mask else 0
    block, blocks = folds(T, window)
    block_elements = block * (window + block)
    seen = rows * (window**2 + blocks * block_elements) if t.document_mask else block_elements
    return t.compute_bytes * seen


def _eager_mask(t: StepShape, window: int | None) -> int:
    """Return the bytes of the shared mask with activation checkpointing.

    Without it each layer keeps its own mask, which `_kept_by_eager` counts.
    """
    rows = t.micro_batch_size if t.document_mask else 1
    return rows * t.seq_len**2 if t.activation_checkpointing else 0


# --- activations that autograd saves -------------------------------------------------------------


def kept_by_block(t: StepShape, layer: int) -> int:
    """Return the bytes that a block saves of a micro-batch for its backward pass, without copies of
    weights in the compute dtype."""
    m, c = t.model, t.compute_bytes
    D, H, Hkv = m.hidden_size, m.num_attention_heads, m.num_key_value_heads
    q, kv = H * m.head_dim, Hkv * m.head_dim
    norms = 4 if m.has_post_norms else 2
    scales = 4 * (norms + H + Hkv)  # 1 / root mean square, of every norm
    mlp = _kept_by_mlp(t, layer)
    if t.compile:
        # Outputs of matrix products and, unless recomputed, their inputs.
        hidden = (1 if m.has_post_norms else 0) + (2 if t.recompute_cheap else 4)
        values = 2 if ATTENTION[t.attention].copies_values else 1
        return t.tokens * (c * (hidden * D + 3 * q + (2 + values) * kv) + mlp + scales)
    normed = 4 if m.norm_is_zero_centered else c  # before the norm's weight scales it
    a_token = 2 * (4 + normed + c) * D  # float32 input, normed, and the next product's input
    a_token += (norms - 2) * (4 + normed) * D
    # Query and key norms: in float32 their input is a view of the product's output.
    a_token += (normed + (4 if c < 4 else 0)) * (q + kv)
    attention = ATTENTION[t.attention].kept(t, m.window(m.layer_types[layer]))
    return round(t.tokens * (a_token + attention + mlp + scales))


def _attention_widths(t: StepShape) -> tuple[int, int, int]:
    """Return the elements a token of queries, of keys, and of the products' outputs, of which the
    query and key norms save views in float32."""
    m = t.model
    q, kv = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
    return q, kv, q + kv if t.compute_bytes == 4 else 0


def _kept_by_eager(t: StepShape, window: int | None) -> float:
    c, (q, kv, outputs) = t.compute_bytes, _attention_widths(t)
    # keys and values repeated for every head, weights also in float32, the mask
    kept = 4 * c * q + t.model.num_attention_heads * t.seq_len * (4 if c == 4 else 6)
    kept += t.seq_len if t.document_mask else t.seq_len / t.micro_batch_size
    return kept + c * (outputs + (kv if t.merged_qkv and outputs else 0))


def _kept_by_blocks(t: StepShape, window: int | None) -> float:
    c, (q, kv, outputs) = t.compute_bytes, _attention_widths(t)
    # copies the values to another layout
    return c * (2 * q + 2 * kv + outputs + (kv if outputs and t.merged_qkv else 0))


def _kept_by_flex(t: StepShape, window: int | None) -> float:
    c, (q, kv, outputs) = t.compute_bytes, _attention_widths(t)
    kept = c * (2 * q + kv) + 4 * t.model.num_attention_heads  # log Σ exp
    return kept + c * (q + 2 * kv if t.merged_qkv else outputs + kv)  # values are a view


def _kept_by_sdpa(t: StepShape, window: int | None) -> float:
    c, (q, kv, _), T = t.compute_bytes, _attention_widths(t), t.seq_len
    kept = _kept_by_flex(t, window)
    if window is not None and window < T:
        # Folded window, computed in two parts: queries, keys and values after the first window are
        # copied into blocks.
        block, blocks = folds(T, window)
        kept += c * (q + blocks / T * (block * q + (window + block) * 2 * kv))
    return kept


@dataclass(frozen=True)
class AttentionMemory:
    """Memory of one attention backend. `window` is the layer's; None for full attention."""

    kept: Callable[[StepShape, int | None], float]
    """(step, window) -> bytes a token that attention saves, from rotated queries and keys to
    output, in a block that is not compiled."""
    mask: Callable[[StepShape, int | None], int] = _no_mask
    """(step, window) -> bytes of the mask that the layers of a kind share."""
    copies_values: bool = False
    """True if it saves the values in two layouts."""


ATTENTION = {
    "eager": AttentionMemory(_kept_by_eager, _eager_mask),
    "sdpa": AttentionMemory(_kept_by_sdpa, _sdpa_mask),
    "blocks": AttentionMemory(_kept_by_blocks, copies_values=True),
    "flex": AttentionMemory(_kept_by_flex),
    "varlen": AttentionMemory(_kept_by_flex),
}
"""Memory of each backend of model/attention_backends/, which this module can't import: it would
load torch."""


def _kept_by_mlp(t: StepShape, layer: int) -> int:
    """Return the bytes a token that the MLP saves."""
    m, c = t.model, t.compute_bytes
    if not m.is_sparse(layer):
        # gate and up; the activated gate and the product with up, unless recomputed
        return (2 if t.recompute_cheap else 3 if t.compile else 4) * c * m.intermediate_size
    K, E = m.num_experts_per_tok, m.num_experts
    # int64: chosen experts, the order that sorts them, its inverse. Float32: their weights, the sum
    # of these, all probabilities; in the compute type the normalized weights.
    routing = 3 * 8 * K + (4 + c) * K + 4 + 4 * E
    # rows sorted by expert, their outputs, and as in a dense MLP gate, up and two products
    return c * K * (2 * m.hidden_size + 4 * m.moe_intermediate_size) + routing
