"""Embedding and head of a new vocabulary, from those of an old one.

Shared tokens keep their rows. The other rows are drawn from a normal distribution with the mean
and covariance of the old rows (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
Language Models"): an untrained row then gets the logits of an average token, and the new tokens
together no more than their share of the probability. Rows of the usual small values would get
logits near 0, which is far above those of trained tokens.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain_cli.errors import CheckpointError

ROWS_AT_ONCE = 2**13
FIRST_JITTER, JITTERS = 1e-9, 6
"""Share of the mean variance that is added to the diagonal of the covariance so that it has a
Cholesky factor, and the number of times it may grow tenfold. A model of fewer tokens than
dimensions has a singular covariance."""


class NewVocabulary(NamedTuple):
    """Rows of a new vocabulary's matrices, and the old rows that they come from."""

    kept: Tensor
    """Rows of the new matrix that are copied. (K,) int64."""
    copied: Tensor
    """Rows of the old matrix that are copied there. (K,) int64."""
    drawn_from: Tensor
    """Rows of the old matrix that give mean and covariance: those of tokens. (N,) int64."""
    seed: int


@torch.no_grad()
def fill(new: Tensor, old: Tensor, vocabulary: NewVocabulary, name: str) -> None:
    """Fill the new matrix (V, D) from the old one (V', D). `name` is the tensor's; each has draws
    of its own. Raises CheckpointError if old rows are not finite."""
    fits = vocabulary.kept < len(new)  # a token without a row is not in the dataset
    is_drawn = torch.ones(len(new), dtype=torch.bool)
    is_drawn[vocabulary.kept[fits]] = False
    pairs = zip(
        vocabulary.kept[fits].split(ROWS_AT_ONCE),
        vocabulary.copied[fits].split(ROWS_AT_ONCE),
        strict=True,
    )
    for kept, copied in pairs:
        new[kept.to(new.device)] = old[copied].to(new)
    mean, factor = mean_and_factor(old, vocabulary.drawn_from, name)
    digest = hashlib.sha256(f"{vocabulary.seed} new rows of {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    for rows in is_drawn.nonzero()[:, 0].split(ROWS_AT_ONCE):
        noise = torch.randn(len(rows), len(mean), generator=generator)
        new[rows.to(new.device)] = (mean + noise @ factor.T).to(new)


def mean_and_factor(matrix: Tensor, rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) of these rows, and the Cholesky factor (D, D) of their covariance, both
    float32. Parts are multiplied in float32, and summed and factorized in float64."""
    D = matrix.shape[1]
    parts = rows.split(ROWS_AT_ONCE)
    mean = torch.zeros(D, dtype=torch.float64)
    for part in parts:
        mean += matrix[part].double().sum(0)
    mean /= len(rows)
    covariance = torch.zeros(D, D, dtype=torch.float64)
    for part in parts:
        centered = (matrix[part].double() - mean).float()
        covariance += (centered.T @ centered).double()
    covariance /= len(rows)
    if not covariance.isfinite().all():
        raise CheckpointError(f"{name}: holds values that are not finite; give intact weights")
    jitter = FIRST_JITTER * max(covariance.trace().item() / D, 1e-12)
    for _ in range(JITTERS):
        factor, failed = torch.linalg.cholesky_ex(covariance + jitter * torch.eye(D).double())
        if not failed.item():
            return mean.float(), factor.float()
        jitter *= 10
    raise AssertionError(f"the covariance of {name} has no Cholesky factor")
