"""The target that marks a position without one. Data writes it; the loss leaves it out."""

IGNORE_INDEX = -100
"""PyTorch's own default, `ignore_index` of `cross_entropy`."""
