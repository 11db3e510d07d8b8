"""Z-loss and balancing loss in training: gradients, accumulation over micro-batches, and logs."""

import copy
import importlib
import json

import pytest
import torch
import torch.nn.functional as F

from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.engine.runs.events import Notice, StepMetrics
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.training.auxiliary_losses import AuxiliaryLosses
from pretrain_cli.engine.training.step import add_gradients, train_step
from pretrain_cli.model.decoder import LossWeights
from tests.engine.jobs import batch_of, job_of

ALONE = Ranks(0, 1, torch.device("cpu"))
SPARSE = {
    "model__name": "qwen3-30b-a3b",
    "model__num_hidden_layers": 2,
    "model__num_experts": 4,
    "model__num_experts_per_tok": 2,
    "model__moe_intermediate_size": 16,
    "train__steps": 3,
}


def test_the_balancing_loss_is_the_mean_over_micro_batches(tiny_model):
    """The reference is transformers' own function, applied to the router logits."""
    balancing_loss = importlib.import_module(
        "transformers.models.qwen3_moe.modeling_qwen3_moe"
    ).load_balancing_loss_func
    model = tiny_model("qwen3-30b-a3b")
    plain = copy.deepcopy(model)
    tokens = torch.randint(1, 30, (6, 12), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = []
    for block in plain.blocks:
        block.mlp.router.register_forward_hook(lambda *io: logits.append(io[-1]))
    expected = 0.0
    for i in range(0, 6, 2):
        logits.clear()
        entropy = plain(inputs[i : i + 2], targets[i : i + 2]).minimized
        part = 0.5 * balancing_loss(tuple(logits), 3, 2) / 3
        (entropy / 3 + part).backward()
        expected += part.item()

    job = job_of(model, micro_batch_size=2, loss_weights=LossWeights(0.0, 0.5))
    _, auxiliary = add_gradients(job, batch_of(inputs, targets))
    numbers = auxiliary.start_read(ALONE)()
    assert numbers["balancing_loss"] == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_a_z_loss_does_not_depend_on_the_micro_batch(tiny_model, micro_batch_size):
    model = tiny_model("qwen3-tiny")
    tokens = torch.randint(1, 30, (4, 12), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 2:] = -100
    counted = targets != -100
    logits = model(inputs)
    z_loss = 0.01 * logits.logsumexp(-1)[counted].square().mean()
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(entropy + z_loss, list(model.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()

    weights = LossWeights(0.01, 0.0)
    job = job_of(model, micro_batch_size=micro_batch_size, loss_weights=weights)
    batch = batch_of(inputs, targets, counted=int(counted.sum()))
    loss, found, auxiliary = train_step(job, batch, StepRates(1e-3))
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-5)
    assert auxiliary.start_read(ALONE)() == {"z_loss": pytest.approx(z_loss.item(), rel=1e-5)}
    assert found.item() == pytest.approx(norm.item(), rel=1e-4)


def test_expert_load_is_each_share_and_overload_is_max_over_mean():
    terms = AuxiliaryLosses(LossWeights(0.0, 0.1))
    terms.sums = torch.zeros(2)
    terms.choices = torch.tensor([[1.0, 1.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0]])
    numbers = terms.start_read(ALONE)()
    assert numbers["expert_load"] == [3 / 16, 3 / 16, 3 / 16, 7 / 16]
    assert numbers["expert_overload"] == 2.5


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def test_a_run_with_experts_logs_their_load(settings, run, tmp_path):
    events = run(settings(**SPARSE, optimizer__z_loss=1e-3))
    assert not any("balancing" in e.text for e in events if isinstance(e, Notice))
    for row in rows(tmp_path / "run"):
        assert 0.001 * 2 * 0.9 < row["balancing_loss"] < 0.001 * 4
        assert len(row["expert_load"]) == 4
        assert sum(row["expert_load"]) == pytest.approx(1, abs=1e-5)
        assert 1 <= row["expert_overload"] <= 2
        assert 0 < row["z_loss"] < row["loss"]


def test_a_dense_run_logs_no_auxiliary_losses_or_expert_load(settings, run, tmp_path):
    run(settings(train__steps=2))
    for row in rows(tmp_path / "run"):
        assert not {"z_loss", "balancing_loss", "expert_load", "expert_overload"} & row.keys()


def test_a_balancing_coefficient_of_zero_gives_a_notice(settings, run):
    events = run(settings(**SPARSE, model__router_aux_loss_coef=0.0))
    assert any("without a balancing loss" in e.text for e in events if isinstance(e, Notice))
    assert all(e.balancing_loss == 0 for e in events if isinstance(e, StepMetrics))
