"""Map from published tensors to our parameters: one table, built from the ModelConfig alone.

Published files hold q, k and v, gate and up, and every expert separately; in memory these may be
rows of one matrix. A PublishedTensor names a published tensor and the part of our parameter that
holds it. Weights on disk, initial weights, saved optimizer state and all code that needs the
logical matrices use this table, so none of them depends on whether projections are merged.

(A table instead of save and load hooks on the modules: hooks see only state_dict(), while the
optimizer's moments, initialization and sharded parameters need the same split.)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from pretrain_cli.model.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Merged(NamedTuple):
    """Choice of linear maps of the same input to merge into one product."""

    qkv: bool = True
    gate_up: bool = True


@dataclass(frozen=True, kw_only=True)
class PublishedTensor:
    """A published tensor, and the part of our parameter that holds it."""

    name: str
    """Published name: model.layers.0.self_attn.q_proj.weight."""
    shape: tuple[int, ...]
    parameter: str
    """Our name: blocks.0.attention.qkv.weight."""
    index: tuple[Any, ...] = ()
    """Expert and rows within the parameter; empty for the whole parameter."""

    @property
    def is_norm(self) -> bool:
        return len(self.shape) == 1

    def of(self, tensor: Any) -> Any:
        """Return the view of this published tensor in a tensor shaped like the parameter."""
        return tensor[self.index] if self.index else tensor


def parameter_map(config: ModelConfig, *, merged: Merged) -> Iterator[PublishedTensor]:
    """Return every published tensor of a model, in the layer order of the published files."""
    D, Dh = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * Dh, config.num_key_value_heads * Dh

    def whole(name: str, parameter: str, *shape: int) -> PublishedTensor:
        return PublishedTensor(name=name, shape=shape, parameter=parameter)

    def group(
        prefix: str, module: str, rows: dict[str, int], *, merged: bool
    ) -> Iterator[PublishedTensor]:
        start = 0
        for name, count in rows.items():
            published = f"{prefix}.{name}.weight"
            if merged:
                yield PublishedTensor(
                    name=published,
                    shape=(count, D),
                    parameter=f"{module}.weight",
                    index=(slice(start, start + count),),
                )
            else:
                yield whole(published, f"{module}.{name}.weight", count, D)
            start += count

    yield whole(EMBEDDING, "embedding.weight", config.vocab_size, D)
    for i in range(config.num_hidden_layers):
        there, here = f"model.layers.{i}", f"blocks.{i}"
        for published, ours in block_norm_names(config).items():
            yield whole(f"{there}.{published}.weight", f"{here}.{ours}.weight", D)
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        yield from group(f"{there}.self_attn", f"{here}.attention.qkv", rows, merged=merged.qkv)
        yield whole(f"{there}.self_attn.o_proj.weight", f"{here}.attention.output.weight", D, q)
        for norm in ("q_norm", "k_norm"):
            yield whole(f"{there}.self_attn.{norm}.weight", f"{here}.attention.{norm}.weight", Dh)
        if config.is_sparse(i):
            yield from _experts(config, there, here)
        else:
            F = config.intermediate_size
            rows = {"gate_proj": F, "up_proj": F}
            gate_up = f"{here}.mlp.gate_up"
            yield from group(f"{there}.mlp", gate_up, rows, merged=merged.gate_up)
            yield whole(f"{there}.mlp.down_proj.weight", f"{here}.mlp.down.weight", D, F)
    yield whole("model.norm.weight", "norm.weight", D)
    if not config.tie_word_embeddings:
        yield whole(HEAD, "head.weight", config.vocab_size, D)


def row_blocks(pieces: Iterable[PublishedTensor]) -> dict[str, list[slice]]:
    """Return the ranges of rows that are one published matrix each, by parameter; for stacked
    experts, the ranges within one expert."""
    blocks: dict[str, list[slice]] = {}
    for piece in pieces:
        rows = next((part for part in piece.index if isinstance(part, slice)), slice(None))
        found = blocks.setdefault(piece.parameter, [])
        if rows not in found:
            found.append(rows)
    return blocks


def block_norm_names(config: ModelConfig) -> dict[str, str]:
    """Map a block's norms over the hidden size from published names to ours.

    `post_attention_layernorm` is the norm of attention's output in Gemma 3, and the norm before the
    MLP in Qwen 3.
    """
    if config.has_post_norms:
        return {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "post_mlp_norm",
        }
    return {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def _experts(config: ModelConfig, there: str, here: str) -> Iterator[PublishedTensor]:
    """Return the router and each expert's three matrices, parts of the two stacked parameters."""
    D, F = config.hidden_size, config.moe_intermediate_size
    router = f"{here}.mlp.router.weight"
    yield PublishedTensor(
        name=f"{there}.mlp.gate.weight", shape=(config.num_experts, D), parameter=router
    )
    for e in range(config.num_experts):
        for name, shape, parameter, index in (
            ("gate_proj", (F, D), "gate_up", (e, slice(0, F))),
            ("up_proj", (F, D), "gate_up", (e, slice(F, 2 * F))),
            ("down_proj", (D, F), "down", (e,)),
        ):
            yield PublishedTensor(
                name=f"{there}.mlp.experts.{e}.{name}.weight",
                shape=shape,
                parameter=f"{here}.mlp.{parameter}",
                index=index,
            )
