"""Qwen 3: full attention everywhere, two norms a block; dense, or with a mixture of experts.

    x ─┬─ norm ── attention ─(+)─┬─ norm ── silu(gate)·up, down ─(+)──
       └─────────────────────┘   └─────────────────────────────┘

- embeddings enter as they are; the head is tied in the sizes up to 4B and its own matrix above
- norm weights are multiplied after casting back to the activations' type
- q and k are normalized per head, before RoPE; scores are scaled by head_dim^-½
- one RoPE base, 1,000,000, and no window
- in the two MoE sizes every MLP is 128 experts, 8 of them chosen for a token by a softmax over all
  128 whose chosen weights are divided by their sum; no shared expert, no capacity limit

Sources: Qwen's config.json files on the hub. max_position_embeddings is the instruct models'.
"""

from dataclasses import replace

from pretrain_cli.model.config import FULL, ModelConfig


def qwen3(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    tie_word_embeddings: bool,
    vocab_size: int,
    max_position_embeddings: int,
    num_experts: int,
    num_experts_per_tok: int,
    moe_intermediate_size: int,
) -> ModelConfig:
    """Return the Qwen 3 config of these sizes. Fields equal in all sizes are set here."""
    is_moe = num_experts > 0
    return ModelConfig(
        model_type="qwen3_moe" if is_moe else "qwen3",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        layer_types=(FULL,) * num_hidden_layers,
        sliding_window=None,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_theta=1_000_000.0,
        rope_local_base_freq=None,
        rope_scaling_factor=1.0,
        rms_norm_eps=1e-6,
        norm_is_zero_centered=False,
        has_post_norms=False,
        hidden_activation="silu",
        embedding_is_scaled=False,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=0.02,
        pad_token_id=None,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        moe_intermediate_size=moe_intermediate_size,
        norm_topk_prob=is_moe,
        router_aux_loss_coef=0.001 if is_moe else 0.0,
        decoder_sparse_step=1,
        mlp_only_layers=(),
    )


def _published(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    *,
    heads: tuple[int, int],
    tied: bool,
    experts: tuple[int, int, int] = (0, 0, 0),
) -> ModelConfig:
    """Return a published size. All have head_dim 128, 151,936 vocabulary rows and 40,960
    positions."""
    return qwen3(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=128,
        tie_word_embeddings=tied,
        vocab_size=151_936,
        max_position_embeddings=40_960,
        num_experts=experts[0],
        num_experts_per_tok=experts[1],
        moe_intermediate_size=experts[2],
    )


PUBLISHED = {
    "qwen3-0.6b": _published(1024, 3072, 28, heads=(16, 8), tied=True),
    "qwen3-1.7b": _published(2048, 6144, 28, heads=(16, 8), tied=True),
    "qwen3-4b": _published(2560, 9728, 36, heads=(32, 8), tied=True),
    "qwen3-8b": _published(4096, 12_288, 36, heads=(32, 8), tied=False),
    "qwen3-14b": _published(5120, 17_408, 40, heads=(40, 8), tied=False),
    "qwen3-32b": _published(5120, 25_600, 64, heads=(64, 8), tied=False),
    "qwen3-30b-a3b": _published(2048, 6144, 48, heads=(32, 4), tied=False, experts=(128, 8, 768)),
    "qwen3-235b-a22b": _published(
        4096, 12_288, 94, heads=(64, 4), tied=False, experts=(128, 8, 1536)
    ),
}

# Not published by Qwen; gemma3.py explains the choice of sizes.
SMALL = {
    "qwen3-tiny": replace(
        qwen3(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
            vocab_size=4096,
            max_position_embeddings=2048,
            num_experts=0,
            num_experts_per_tok=0,
            moe_intermediate_size=0,
        ),
        initializer_range=0.08,
    ),
    "qwen3-small": qwen3(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        vocab_size=32_000,
        max_position_embeddings=32_768,
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
    ),
}
