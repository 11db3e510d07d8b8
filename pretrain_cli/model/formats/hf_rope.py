"""RoPE in a config.json: two spellings, transformers 4's and 5's, and files that have both."""

from typing import Any

from pretrain_cli.errors import ConfigError
from pretrain_cli.model.config import FULL, SLIDING

ROPE_FIELDS = {
    "rope_type", "type", "rope_theta", "factor", "partial_rotary_factor",
    "original_max_position_embeddings",  # of YaRN and its like, which are refused by their type
}  # fmt: skip


def read_rope(raw: dict[str, Any], kind: str, spelled: str, default: float) -> tuple[float, float]:
    """(base, factor) of one kind of layer, from either spelling or both.

    Where the two contradict each other, one version of transformers follows the one and the next
    the other: refused.
    """
    parameters = raw.get("rope_parameters", {})
    if FULL in parameters or SLIDING in parameters:
        parameters = parameters.get(kind) or {}
    scaling = raw.get("rope_scaling", {}) if kind == FULL else {}
    for fields in (scaling, parameters):
        rope_type = fields.get("rope_type", fields.get("type", "default"))
        if rope_type not in ("default", "linear"):
            raise ConfigError(
                f"config.json: RoPE scaling '{rope_type}' of {kind} layers, which this decoder "
                "does not compute (it computes default and linear)"
            )
        for name in sorted(fields.keys() - ROPE_FIELDS):
            raise ConfigError(f"config.json: RoPE's {name} of {kind} layers is not known here")
        if fields.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(
                f"config.json: partial_rotary_factor is {fields['partial_rotary_factor']}, which "
                "this decoder does not compute"
            )
    factors = [_factor(fields) for fields in (scaling, parameters) if fields]
    bases = [fields[name] for fields, name in
             ((raw, spelled), (scaling, "rope_theta"), (parameters, "rope_theta"))
             if name in fields]  # fmt: skip
    for what, found in (("scaling", factors), ("base", bases)):
        if len(set(found)) > 1:
            raise ConfigError(
                f"config.json: two values for the RoPE {what} of {kind} layers, {found[0]} and "
                f"{found[-1]}, in rope_parameters and outside of it; keep one"
            )
    return float(bases[0] if bases else default), float(factors[0] if factors else 1.0)


def _factor(fields: dict[str, Any]) -> float:
    is_linear = fields.get("rope_type", fields.get("type")) == "linear"
    return fields.get("factor", 1.0) if is_linear else 1.0
