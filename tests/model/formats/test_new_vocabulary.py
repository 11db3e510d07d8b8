"""Rows of a new vocabulary: kept to the bit, or drawn with the old rows' mean and covariance."""

import pytest
import torch

from pretrain_cli.errors import CheckpointError
from pretrain_cli.model.formats.new_vocabulary import NewVocabulary, fill

OLD, D, NEW = 3000, 12, 30_000


def old_rows(rows=OLD):
    """Return rows with a mean far from 0 and a covariance of very unequal axes."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(D, D, generator=generator) * torch.logspace(-2, 0, D)
    return torch.randn(rows, D, generator=generator) @ mixing.T + torch.arange(D)


def vocabulary(old, seed=0, kept=(7, 3, 29_999), copied=(0, 2999, 5)):
    return NewVocabulary(torch.tensor(kept), torch.tensor(copied), torch.arange(len(old)), seed)


def filled(old, size=NEW, name="embed", **options):
    new = torch.full((size, D), torch.nan)
    fill(new, old, vocabulary(old, **options), name)
    return new


def test_kept_rows_are_equal_to_the_bit():
    old = old_rows()
    new = filled(old)
    for kept, copied in ((7, 0), (3, 2999), (29_999, 5)):
        assert torch.equal(new[kept], old[copied])
    assert new.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_have_the_mean_and_covariance_of_the_old(dtype):
    old = old_rows().to(dtype)
    new = filled(old)[8:29_999]
    reference = old.double()
    scale = reference.std(0)
    error = (new.double().mean(0) - reference.mean(0)) / scale
    assert error.abs().max() < 5 / len(new) ** 0.5
    difference = (new.double().T.cov() - reference.T.cov()) / scale.outer(scale)
    assert difference.abs().max() < 5 * (2 / len(new)) ** 0.5


def test_other_rows_do_not_count():
    """Spare rows of the old matrix, which no token has, don't move the mean."""
    old = old_rows()
    spoiled = torch.cat([old, torch.full((500, D), 1e6)])
    new = torch.empty(NEW, D)
    fill(new, spoiled, vocabulary(old), "embed")
    assert torch.equal(new, filled(old))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_fewer_old_rows_than_dimensions_are_enough(rows):
    """Their covariance is singular: draws stay in the plane of the old rows."""
    old = old_rows(rows)
    new = filled(old, copied=(0, 0, 0))[8:29_999].double()
    away = new - old.double().mean(0)
    basis = torch.linalg.svd(old.double() - old.double().mean(0), full_matrices=False)
    plane = basis.Vh[basis.S > 1e-4]
    outside = away - away @ plane.T @ plane
    assert outside.norm() <= 3e-3 * max(away.norm(), 1)


def test_draws_are_decided_by_the_seed_and_the_tensor():
    old = old_rows()
    assert torch.equal(filled(old), filled(old))
    assert not torch.equal(filled(old)[8], filled(old, seed=1)[8])
    assert not torch.equal(filled(old)[8], filled(old, name="head")[8])


def test_tokens_without_a_row_are_left_out():
    assert filled(old_rows(), size=10).isfinite().all()


def test_values_that_are_not_finite_are_refused():
    old = old_rows()
    old[4, 2] = torch.inf
    with pytest.raises(CheckpointError, match="embed: holds values that are not finite"):
        filled(old)
