"""ModelConfig: the numbers that define an architecture, named as in config.json."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pretrain_cli.errors import ConfigError, did_you_mean

FULL, SLIDING = "full_attention", "sliding_attention"
Activation = Literal["gelu_pytorch_tanh", "silu"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of a model_type that its config.json has no field for.

    A model that differs in one of them is refused: transformers would open its checkpoint as a
    different model.
    """

    name: str
    """Name for people, such as Gemma 3."""
    norm_is_zero_centered: bool
    has_post_norms: bool
    embedding_is_scaled: bool
    has_windows: bool
    """True if layers may slide, with a RoPE base of their own."""
    has_experts: bool
    scales_by_head_dim: bool
    """True if attention scores are always scaled by head_dim; False if the config says by what."""
    heads_divide_width: bool
    """True if transformers refuses a hidden_size that is no multiple of the number of heads."""


def _qwen3(name: str, *, has_experts: bool) -> Family:
    return Family(
        name=name,
        norm_is_zero_centered=False,
        has_post_norms=False,
        embedding_is_scaled=False,
        has_windows=False,
        has_experts=has_experts,
        scales_by_head_dim=True,
        heads_divide_width=False,
    )


FAMILIES = {
    "gemma3_text": Family(
        name="Gemma 3",
        norm_is_zero_centered=True,
        has_post_norms=True,
        embedding_is_scaled=True,
        has_windows=True,
        has_experts=False,
        scales_by_head_dim=False,
        heads_divide_width=True,
    ),
    "qwen3": _qwen3("Qwen 3", has_experts=False),
    "qwen3_moe": _qwen3("Qwen 3", has_experts=True),
}
"""Families by model_type. Their presets are in a file each; config.json and GGUF have rows of the
same names in `formats/hf_config.py` and `formats/gguf.py`."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One architecture. No field has a default, so that no size can inherit another's number."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the dense MLP."""
    layer_types: tuple[str, ...]
    """`full_attention` or `sliding_attention` for each layer; its length is the depth."""
    sliding_window: int | None
    """Keys that a sliding layer sees, the query's own included."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    """Attention scores are multiplied by this to the power of −1/2."""
    max_position_embeddings: int
    rope_theta: float
    """RoPE base of the full layers."""
    rope_local_base_freq: float | None
    """RoPE base of the sliding layers."""
    rope_scaling_factor: float
    """Divisor of the positions in full layers; 1.0 has no effect."""
    rms_norm_eps: float
    norm_is_zero_centered: bool
    """True if norm weights are stored minus one (Gemma 3)."""
    has_post_norms: bool
    """True if a norm follows each sublayer, before the residual addition (Gemma 3)."""
    hidden_activation: Activation
    embedding_is_scaled: bool
    """True if embeddings are multiplied by the square root of hidden_size (Gemma 3)."""
    tie_word_embeddings: bool
    """True if the output head is the embedding matrix."""
    initializer_range: float
    pad_token_id: int | None
    """Token whose embedding row starts at zero and gets no gradient from lookups, as in
    transformers; None for no such token."""
    num_experts: int
    """Number of experts; 0 in a dense model, where the six fields below have no meaning."""
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    router_aux_loss_coef: float
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def attention_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5

    def window(self, layer_type: str) -> int | None:
        """Return the keys that a layer of this type sees, itself included; None for all earlier
        ones."""
        return self.sliding_window if layer_type == SLIDING else None

    def rope_base(self, layer_type: str) -> tuple[float, float]:
        """Return RoPE's base and the divisor of positions for a layer of this type."""
        if layer_type == SLIDING and self.rope_local_base_freq is not None:
            return self.rope_local_base_freq, 1.0
        return self.rope_theta, self.rope_scaling_factor

    def is_sparse(self, layer: int) -> bool:
        """Return whether this layer's MLP is a mixture of experts."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings",
                     "decoder_sparse_step", "query_pre_attn_scalar", "rope_theta",
                     "rope_scaling_factor", "rms_norm_eps"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name}: {getattr(self, name)} is not above zero")
        for name, known in (
            ("model_type", tuple(FAMILIES)),
            ("hidden_activation", get_args(Activation)),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"model.{name}: '{value}' is not one of {', '.join(known)}")
        if not self.layer_types:
            raise ConfigError("model.layer_types: empty; a model needs at least one layer")
        for kind in set(self.layer_types) - {FULL, SLIDING}:
            raise ConfigError(f"model.layer_types: '{kind}' is not one of {FULL}, {SLIDING}")
        if SLIDING in self.layer_types and (self.sliding_window is None or self.sliding_window < 1):
            raise ConfigError(
                f"model.sliding_window: {self.sliding_window} with sliding layers; "
                "give a window of at least 1, or make every layer full_attention"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ConfigError(
                f"model.pad_token_id: {self.pad_token_id} is not in a vocabulary of "
                f"{self.vocab_size}; give one of its ids, or null"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim: {self.head_dim} is odd; RoPE turns pairs")
        family = self.family
        if family.heads_divide_width and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.hidden_size: {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; transformers refuses to open such a {family.name}"
            )
        self._check_family(family)
        if (self.num_experts > 0) != family.has_experts:
            raise ConfigError(
                f"model.num_experts: {self.num_experts} does not go with {self.model_type}"
            )
        if self.num_experts and not 0 < self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"model.num_experts_per_tok: {self.num_experts_per_tok} is not between 1 and "
                f"num_experts {self.num_experts}"
            )
        if self.num_experts and self.moe_intermediate_size <= 0:
            raise ConfigError(
                f"model.moe_intermediate_size: {self.moe_intermediate_size} is not above zero"
            )
        coefficient = self.router_aux_loss_coef
        if coefficient and not (self.num_experts and 0 < coefficient < math.inf):
            reason = "is not 0 or more" if self.num_experts else "with no experts to balance"
            raise ConfigError(f"model.router_aux_loss_coef: {coefficient} {reason}")
        for name in ("hidden_size", "moe_intermediate_size") if self.num_experts else ():
            if getattr(self, name) % 8:
                raise ConfigError(
                    f"model.{name}: {getattr(self, name)} is not a multiple of 8, which experts "
                    "need: grouped_mm takes rows of 16 bytes"
                )

    def _check_family(self, family: Family) -> None:
        for name in ("norm_is_zero_centered", "has_post_norms", "embedding_is_scaled"):
            value = getattr(self, name)
            if value != getattr(family, name):
                raise ConfigError(f"model.{name}: {value} does not go with {self.model_type}")
        if (self.rope_local_base_freq is not None) != family.has_windows:
            raise ConfigError(
                f"model.rope_local_base_freq: {self.rope_local_base_freq} does not go with "
                f"{self.model_type}"
            )
        if SLIDING in self.layer_types and not family.has_windows:
            raise ConfigError(f"model.layer_types: {SLIDING} does not go with {self.model_type}")
        if family.scales_by_head_dim and self.query_pre_attn_scalar != self.head_dim:
            raise ConfigError(
                f"model.query_pre_attn_scalar: {self.query_pre_attn_scalar}, but {self.model_type} "
                f"scales by its head_dim, {self.head_dim}"
            )


FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
FLOATS = frozenset(name for name, field in FIELDS.items() if "float" in str(field.type))


def variant(config: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    """Return the config with some fields changed by name, after checks.

    `num_hidden_layers` is accepted too: it repeats the config's layer pattern to that depth. In a
    family that scales by head_dim, the attention scale follows it.
    """
    changes = dict(changes)
    known = [*FIELDS, "num_hidden_layers"]
    for name, value in changes.items():
        if name not in known:
            near = did_you_mean(f"model.{name}", [f"model.{other}" for other in known])
            raise ConfigError(f"model.{name}: no such setting{near}")
        changes[name] = checked(name, value)
    depth = changes.pop("num_hidden_layers", None)
    if depth is not None and "layer_types" not in changes:
        changes["layer_types"] = _repeated(config.layer_types, depth)
    if depth is not None and depth != len(changes["layer_types"]):
        raise ConfigError(
            f"model.num_hidden_layers: {depth}, but layer_types has {len(changes['layer_types'])}"
        )
    if config.family.scales_by_head_dim and "head_dim" in changes:
        changes.setdefault("query_pre_attn_scalar", changes["head_dim"])
    return dataclasses.replace(config, **changes)


def checked(name: str, value: Any) -> Any:
    """Return the value in the field's type. Raises ConfigError that says what the field takes."""
    from pydantic import TypeAdapter, ValidationError

    wanted: Any = int if name == "num_hidden_layers" else FIELDS[name].type
    if isinstance(value, bool) and wanted is not bool:
        raise ConfigError(f"model.{name}: {value!r} is not {_said(wanted)}")
    try:
        return TypeAdapter(wanted).validate_python(value)
    except ValidationError:
        raise ConfigError(f"model.{name}: {value!r} is not {_said(wanted)}") from None


def _said(wanted: Any) -> str:
    names: dict[Any, str] = {
        int: "a whole number", float: "a number", bool: "true or false", str: "text",
    }  # fmt: skip
    return names.get(wanted, str(wanted).replace("typing.", ""))


def _repeated(pattern: tuple[str, ...], depth: int) -> tuple[str, ...]:
    """Repeat the pattern's smallest period to this depth; Gemma's is 5 sliding layers and 1
    full."""
    if depth < 1:
        raise ConfigError(f"model.num_hidden_layers: {depth} is not above zero")
    period = next(
        p
        for p in range(1, len(pattern) + 1)
        if all(kind == pattern[i % p] for i, kind in enumerate(pattern))
    )
    return tuple(pattern[i % period] for i in range(depth))
