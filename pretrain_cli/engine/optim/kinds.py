"""Optimizers by name: what each keeps for a matrix, and where it can run.

Every optimizer here updates the layers' matrices; AdamW updates everything else beside it.
Imports no torch, so that memory is estimated without it.
`optimizer.MATRIX_OPTIMIZERS` builds them.
"""

from dataclasses import dataclass

ADAMW_STATE = ("exp_avg", "exp_avg_sq")
"""AdamW's tensors for each parameter, each of its shape."""


@dataclass(frozen=True)
class OptimizerKind:
    """Facts of an optimizer that do not depend on its settings."""

    matrix_state: tuple[str, ...]
    """Names of its tensors for each matrix of a layer, each of the matrix's shape."""
    row_state: tuple[str, ...] = ()
    """Names of its tensors with one number for each row of a matrix; a setting may leave them
    out."""
    no_shards: str = ""
    """Reason why it cannot update sharded matrices; empty if it can."""


OPTIMIZERS = {
    "adamw": OptimizerKind(ADAMW_STATE),
    "muon": OptimizerKind(
        ("momentum_buffer",),
        row_state=("row_squares",),
        no_shards="makes whole matrices orthogonal, and train.parallel 'fsdp' leaves each rank a "
        "part of them",
    ),
}
"""Optimizers by their name in optimizer.name."""
