"""Gemma 3: five sliding layers to one full, four norms a block, a very large vocabulary.

    x ─┬─ norm ── attention ── norm ─(+)─┬─ norm ── gelu(gate)·up, down ── norm ─(+)──
       └──────────────────────────────┘  └────────────────────────────────────────┘

- embeddings are multiplied by √hidden_size; the head is the embedding matrix (tied)
- norm weights are stored minus one and multiplied in float32
- q and k are normalized per head, before RoPE; scores are scaled by query_pre_attn_scalar^-½
- layer i attends to all earlier tokens iff (i + 1) % 6 == 0, else to the last `sliding_window`;
  RoPE's base is 1,000,000 in the full layers (from 4B up with positions divided by 8) and 10,000
  in the sliding ones

Sources: Google's config.json files and DeepMind's gemma repository. Sizes from 4B up are published
inside multimodal checkpoints: 262,144 tokens plus 64 rows for images; here is their text decoder.
"""

from dataclasses import replace

from pretrain_cli.model.config import FULL, SLIDING, ModelConfig


def gemma3(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    query_pre_attn_scalar: float,
    sliding_window: int,
    vocab_size: int,
    max_position_embeddings: int,
    rope_scaling_factor: float,
) -> ModelConfig:
    """Return the Gemma 3 config of these sizes. Fields equal in all sizes are set here."""
    return ModelConfig(
        model_type="gemma3_text",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        layer_types=tuple(FULL if (i + 1) % 6 == 0 else SLIDING for i in range(num_hidden_layers)),
        sliding_window=sliding_window,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=query_pre_attn_scalar,
        max_position_embeddings=max_position_embeddings,
        rope_theta=1_000_000.0,
        rope_local_base_freq=10_000.0,
        rope_scaling_factor=rope_scaling_factor,
        rms_norm_eps=1e-6,
        norm_is_zero_centered=True,
        has_post_norms=True,
        hidden_activation="gelu_pytorch_tanh",
        embedding_is_scaled=True,
        tie_word_embeddings=True,
        initializer_range=0.02,
        pad_token_id=0,
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        norm_topk_prob=False,
        router_aux_loss_coef=0.0,
        decoder_sparse_step=1,
        mlp_only_layers=(),
    )


PUBLISHED = {
    "gemma3-270m": gemma3(
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        vocab_size=262_144,
        max_position_embeddings=32_768,
        rope_scaling_factor=1.0,
    ),
    "gemma3-1b": gemma3(
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        vocab_size=262_144,
        max_position_embeddings=32_768,
        rope_scaling_factor=1.0,
    ),
    "gemma3-4b": gemma3(
        hidden_size=2560,
        intermediate_size=10_240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=1024,
        vocab_size=262_208,
        max_position_embeddings=131_072,
        rope_scaling_factor=8.0,
    ),
    "gemma3-12b": gemma3(
        hidden_size=3840,
        intermediate_size=15_360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=1024,
        vocab_size=262_208,
        max_position_embeddings=131_072,
        rope_scaling_factor=8.0,
    ),
    "gemma3-27b": gemma3(
        hidden_size=5376,
        intermediate_size=21_504,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,  # hidden_size / heads; head_dim in all other sizes
        sliding_window=1024,
        vocab_size=262_208,
        max_position_embeddings=131_072,
        rope_scaling_factor=8.0,
    ),
}

# Not published by Google. The tiny one learns something on two CPU cores in minutes. Its initial
# standard deviation is near 1/√hidden_size: with the published 0.02, so narrow a model learns less
# in its first minutes. The small one is large enough that matrix products dominate its time, as in
# the published sizes, and small enough to be measured on two CPU cores.
SMALL = {
    "gemma3-tiny": replace(
        gemma3(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=64,
            query_pre_attn_scalar=64,
            sliding_window=128,
            vocab_size=4096,
            max_position_embeddings=2048,
            rope_scaling_factor=1.0,
        ),
        initializer_range=0.08,
    ),
    "gemma3-small": gemma3(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=512,
        vocab_size=32_000,
        max_position_embeddings=32_768,
        rope_scaling_factor=1.0,
    ),
}
