"""The record of a step that was skipped: which samples, what text, whose gradients.

It is made when the step is noticed, from its batch read again, since a batch is a function of its
samples' numbers. Rare, and it takes the time of some steps.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pretrain_cli.engine.planning.plan import Plan
from pretrain_cli.engine.runs.events import Skipped
from pretrain_cli.engine.runtime.distributed import Ranks, full_tensor, reshard
from pretrain_cli.engine.training.auxiliary_losses import AuxiliaryLosses
from pretrain_cli.engine.training.prefetch import DeviceBatch, Prefetcher
from pretrain_cli.engine.training.step import add_gradients
from pretrain_cli.engine.training.step_guard import StepOutcome
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.parameter_map import parameter_map

WORST_SAMPLES = 3
WORST_TENSORS = 5
HEAD = 200
"""Characters of a sample's text that are recorded."""


def diagnose(
    verdict: StepOutcome,
    *,
    step: int,
    samples: tuple[int, int],
    same_weights: bool,
    rollbacks: int,
    plan: Plan,
    feed: Prefetcher,
    decoder: Decoder,
    model: nn.Module,
    ranks: Ranks,
) -> Skipped:
    """Run these samples again, forward one by one, then forward and backward together. Every rank
    asks. `same_weights` says whether the weights are still those that the step met."""
    batch = feed.at(samples[0])
    losses = _loss_of_each(model, batch, feed, ranks).tolist()
    add_gradients(
        model,
        batch.inputs,
        batch.targets,
        micro_batch_size=plan.micro_batch_size,
        world_size=ranks.world_size,
        counted=batch.counted,
        documents=batch.documents,
        terms=AuxiliaryLosses(plan.coefficients) if plan.coefficients else None,
    )
    norms = _norm_of_each(decoder)
    decoder.zero_grad(set_to_none=True)
    return Skipped(
        step=step,
        reason=verdict.reason,
        loss=verdict.loss,
        gradient_norm=verdict.gradient_norm,
        samples=samples,
        worst_samples=[
            _sample(samples[0] + place, losses[place], plan, feed)
            for place in _worst(dict(enumerate(losses)), WORST_SAMPLES)
        ],
        worst_gradients={name: norms[name] for name in _worst(norms, WORST_TENSORS)},
        same_weights=same_weights,
        rollbacks=rollbacks,
    )


@torch.no_grad()
def _loss_of_each(model: nn.Module, batch: DeviceBatch, feed: Prefetcher, ranks: Ranks) -> Tensor:
    """The loss of each sample of the step, on all ranks. -> (samples,)"""
    losses = torch.zeros(feed.batches.samples_per_step, device=ranks.device)
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # one sample is a shape of its own
        for row in range(len(batch.inputs)):
            one = batch.each(lambda part, row=row: part[row : row + 1])
            losses[feed.batches.first + row] = model(
                one.inputs, one.targets, documents=one.documents
            )
    reshard(model)
    return ranks.sum(losses)


def _norm_of_each(decoder: Decoder) -> dict[str, float]:
    """The gradient norm of every tensor, by its published name."""
    parameters, norms = dict(decoder.named_parameters()), {}
    gathered: tuple[str, Tensor | None] = "", None
    for piece in parameter_map(decoder.config, merged=decoder.merged):
        if piece.parameter != gathered[0]:
            grad = parameters[piece.parameter].grad
            gathered = piece.parameter, None if grad is None else full_tensor(grad).cpu()
        if gathered[1] is not None:
            norm = torch.linalg.vector_norm(piece.of(gathered[1]), dtype=torch.float64)
            norms[piece.name] = norm.item()
    return norms


def _worst(numbers: dict[Any, float], count: int) -> list[Any]:
    """Those that are not finite, and then the largest."""
    return sorted(numbers, key=lambda name: _size(numbers[name]), reverse=True)[:count]


def _size(number: float) -> float:
    return number if math.isfinite(number) else math.inf


def _sample(number: int, loss: float, plan: Plan, feed: Prefetcher) -> dict[str, Any]:
    source, tokens = feed.batches.sample(number)
    return {
        "sample": number,
        "source": plan.data.trained_on[source].name,
        "loss": loss,
        "text": plan.data.tokenizer.decode(tokens.tolist())[:HEAD],
    }
