"""One training step: accumulation, the mean loss, AdamW and clipping."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from pretrain_cli.data.batches import document_numbers
from pretrain_cli.engine.optim.optimizer import build_optimizer
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.engine.training.step import train_step
from pretrain_cli.targets import IGNORE_INDEX
from tests.engine.jobs import batch_of, job_of, recipe_of
from tests.engine.training.test_train import small_model


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4])
def test_accumulated_micro_batches_equal_one_large_batch(micro_batch_size, masked):
    model = small_model()
    tokens = torch.randint(1, 64, (8, 25), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    numbers = torch.from_numpy(document_numbers(inputs.numpy(), 5, leads=False))
    documents = numbers if masked else None
    whole = copy.deepcopy(model)
    results = []
    batch = batch_of(inputs, targets, documents)
    for one, rows in ((model, micro_batch_size), (whole, 8)):
        job = job_of(one, micro_batch_size=rows)
        results.append([train_step(job, batch, StepRates(1e-3))[:2] for _ in range(3)])
    for (loss, norm), (expected_loss, expected_norm) in zip(*results, strict=True):
        torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=0)
        torch.testing.assert_close(norm, expected_norm, rtol=2e-5, atol=0)


def test_ignored_targets_have_no_part_in_the_mean_loss():
    """Some rows have few targets or none. The loss is the mean over all counted targets, however
    many each micro-batch has."""
    model = small_model()
    whole = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 64, (6, 17), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 3:] = targets[2] = targets[5, :9] = IGNORE_INDEX
    counted = int((targets != IGNORE_INDEX).sum())
    assert counted == 3 + 3 * 16 + 7
    results = []
    for one, rows in ((model, 2), (whole, 6)):
        with torch.no_grad():
            logits = one(inputs).flatten(0, 1)
        expected = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX)
        batch = batch_of(inputs, targets, counted=counted)
        loss, norm, _ = train_step(job_of(one, micro_batch_size=rows), batch, StepRates(1e-3))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        results.append(norm.item())
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_a_step_equals_torchs_adamw_on_the_clipped_mean_loss():
    model = small_model("qwen3-tiny")
    reference = copy.deepcopy(model)
    tokens = torch.randint(1, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    optimizer = build_optimizer(model, recipe_of(model, eps=1e-4), fused=True)
    matrices = [p for p in reference.parameters() if p.ndim == 2]
    norms = [p for p in reference.parameters() if p.ndim == 1]
    plain = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-4,
        foreach=False,
    )
    for _ in range(3):
        job = job_of(model, optimizer, micro_batch_size=2, clip=0.5)
        loss, norm, _ = train_step(job, batch_of(inputs, targets), StepRates(1e-2))
        plain.zero_grad()
        expected = F.cross_entropy(reference(inputs).flatten(0, 1), targets.flatten())
        expected.backward()
        total = math.sqrt(sum(p.grad.square().sum().item() for p in reference.parameters()))
        for parameter in reference.parameters():
            parameter.grad *= min(1.0, 0.5 / total)
        plain.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert norm.item() == pytest.approx(total, rel=1e-4)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["gemma3-tiny", "qwen3-tiny"])
def test_a_small_model_memorizes_a_batch(name):
    model = small_model(name)
    tokens = torch.randint(1, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    job, batch = job_of(model), batch_of(tokens[:, :-1], tokens[:, 1:])
    for _ in range(150):
        loss = train_step(job, batch, StepRates(1e-2)).loss
    assert loss.item() < 0.2
