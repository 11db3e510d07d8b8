"""Parameters, FLOPs and memory of a model, computed from its ModelConfig without allocating it.

Only matrix multiplications count as FLOPs; a multiply-add is two. For each trained token:

    exact         6 N + 12 · H · Dh · (visible keys, summed over the layers)
    conventional  6 N + 12 · H · Dh · T · L      as if every token saw all T (PaLM, nanoGPT)

N counts the matrices used for a token. It leaves out unchosen experts and the embedding lookup, and
includes the head, tied or not.

In a sequence of length T, a token sees (T + 1) / 2 keys on average in a full layer, and fewer in a
sliding one.
"""

from dataclasses import dataclass
from typing import NamedTuple

from pretrain_cli.model.config import ModelConfig

CHUNK_ELEMENTS = {"cpu": 2**27, "cuda": 2**30}
"""Maximum number of logits that the chunked loss holds at a time. Fewer mean more passes over the V
× D gradient; more take more memory."""
CHUNK_ROWS, TILE = (2048, 8192), 128
"""Fewest and most tokens of a chunk on a GPU, and the number that the tokens of a chunk are a
multiple of. Matrix products run at full rate from the fewest on; more than the most only take
memory. A tile of a product has up to 128 rows or columns."""
SOFTMAX_ELEMENTS = 2**21
"""Maximum number of logits in one softmax call on a CPU: 8 MB in float32."""


def loss_chunk_rows(tokens: int, vocab_size: int, device: str) -> int:
    """Return the tokens of a chunk of the loss.

    On a GPU all chunks have the same size, so that nothing recompiles: the largest multiple of
    `TILE` within the limits that divides the tokens, or else the one that makes the fewest chunks.
    """
    most = CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cpu"]) // vocab_size
    if device != "cuda":
        return max(1, min(most, tokens))
    most = max(CHUNK_ROWS[0], min(most, CHUNK_ROWS[1])) // TILE * TILE
    if tokens <= most:
        return max(1, tokens)
    for count in range(-(-tokens // most), tokens // CHUNK_ROWS[0] + 1):
        if tokens % (count * TILE) == 0:
            return tokens // count
    return -(-tokens // -(-tokens // most) // TILE) * TILE


class LossChunk(NamedTuple):
    """Tokens that the loss takes at a time."""

    start: int
    stop: int
    repeated: int
    """The first tokens of the chunk that belong to the chunk before it. They count there."""


def loss_chunks(tokens: int, vocab_size: int, device: str) -> list[LossChunk]:
    """Return the chunks of the loss in the order in which it takes them.

    On a GPU the last one, if there are too few tokens left, begins earlier to have the size of the
    others. It is taken first, so that they overwrite what it leaves for the repeated tokens:

        tokens  0 1 2 3 4 5 6       rows 3
                        ▒ ▒ █       first
                █ █ █ █ █ █         then these two
    """
    rows = loss_chunk_rows(tokens, vocab_size, device)
    left = tokens % rows
    chunks = [LossChunk(start, start + rows, 0) for start in range(0, tokens - left, rows)]
    if not left:
        return chunks
    if device != "cuda":
        return [*chunks, LossChunk(tokens - left, tokens, 0)]
    return [LossChunk(tokens - rows, tokens, rows - left), *chunks]


def folds(length: int, window: int) -> tuple[int, int]:
    """Return (queries of a block, blocks) after the first `window` queries of a sliding window in
    PyTorch's fused attention. A block has half a window of queries."""
    block = -(-window // 2)
    return block, -(-(length - window) // block)


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters by part; `head` is zero if it is the embedding matrix."""

    embeddings: int
    attention: int
    mlp: int
    norms: int
    head: int
    inactive: int
    """MLP parameters that a token does not use: the experts not chosen for it."""

    @property
    def total(self) -> int:
        return self.embeddings + self.attention + self.mlp + self.norms + self.head

    @property
    def active(self) -> int:
        return self.total - self.inactive


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Return the parameters of a model, by part."""
    D, Dh = config.hidden_size, config.head_dim
    H, Hkv = config.num_attention_heads, config.num_key_value_heads
    L = config.num_hidden_layers
    sparse = sum(config.is_sparse(layer) for layer in range(L))
    expert = 3 * D * config.moe_intermediate_size
    block_norms = (4 if config.has_post_norms else 2) * D + 2 * Dh
    return ParameterCount(
        embeddings=config.vocab_size * D,
        attention=L * D * Dh * (2 * H + 2 * Hkv),
        mlp=(L - sparse) * 3 * D * config.intermediate_size
        + sparse * config.num_experts * (expert + D),
        norms=L * block_norms + D,
        head=0 if config.tie_word_embeddings else config.vocab_size * D,
        inactive=sparse * (config.num_experts - config.num_experts_per_tok) * expert,
    )


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Training FLOPs per token, forward and backward."""

    exact: float
    conventional: float


def keys_seen(seq_len: int, window: int | None) -> float:
    """Return the average number of keys that a token of a causal sequence sees, itself included."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def training_flops(config: ModelConfig, seq_len: int) -> Flops:
    """Return the FLOPs to train on one token in sequences of this length."""
    count = count_parameters(config)
    head = config.vocab_size * config.hidden_size
    matrices = count.attention + count.mlp - count.inactive + head
    width = config.num_attention_heads * config.head_dim
    seen = sum(keys_seen(seq_len, config.window(kind)) for kind in config.layer_types)
    return Flops(
        exact=6 * matrices + 12 * width * seen,
        conventional=6 * matrices + 12 * width * seq_len * config.num_hidden_layers,
    )


def suggested_tokens(config: ModelConfig) -> int:
    """Return a number of training tokens: 20 for each active parameter (Hoffmann et al. 2022)."""
    return 20 * count_parameters(config).active


def state_bytes(config: ModelConfig) -> int:
    """Return the bytes held throughout training: float32 weights, gradients and AdamW's two
    moments."""
    return 16 * count_parameters(config).total


def checkpoint_bytes(config: ModelConfig) -> int:
    """Return the bytes of a checkpoint's weights and AdamW's two moments; its copy in host memory
    takes as many."""
    return 12 * count_parameters(config).total


def cache_bytes(config: ModelConfig, seq_len: int, compute_bytes: int) -> int:
    """Return the bytes of one text's key/value cache: a key and a value per key/value head, for
    every token in full layers and for the window in sliding layers."""
    windows = [config.window(kind) or seq_len for kind in config.layer_types]
    places = sum(min(window, seq_len) for window in windows)
    return 2 * places * config.num_key_value_heads * config.head_dim * compute_bytes
