"""The block masks of `flex`: made once for a fixed mask, and for each batch of documents."""

import pytest
import torch

from pretrain_cli.model.attention_backends import flex
from pretrain_cli.model.attention_backends.backends import BACKENDS
from pretrain_cli.model.attention_backends.mask import Documents, Mask
from tests.model.attention_backends.cases import CPU, starting_at


@pytest.fixture
def made_masks(monkeypatch):
    """Return the calls of create_block_mask."""
    calls = []
    make = flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", lambda *a, **o: calls.append(a) or make(*a, **o))
    flex._fixed_mask.cache_clear()
    return calls


def lower(mask):
    return BACKENDS["flex"].lower(mask, CPU, torch.float32)


def test_a_fixed_mask_is_made_once(made_masks):
    first, again = (lower(Mask(300, 300, 100, rows=rows)) for rows in (2, 4))
    assert again is first
    assert lower(Mask(300, 300, None)) is not first
    assert len(made_masks) == 2


def test_documents_get_a_mask_for_each_batch(made_masks):
    masks = [
        lower(Mask(300, 300, 100, Documents(starting_at((start,), (), length=300))))
        for start in (128, 256)
    ]
    assert len(made_masks) == 2
    assert not torch.equal(masks[0].to_dense(), masks[1].to_dense())
