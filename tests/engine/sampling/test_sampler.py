"""Sampling: equal to transformers' processors, and draws that depend on the seed only."""

import importlib

import pytest
import torch

from pretrain_cli.engine.sampling.sampler import (
    SamplingParams,
    draw,
    probabilities,
    sample_next,
    uniforms,
)
from pretrain_cli.errors import ConfigError


def warped(logits, prompt, **params):
    """Return the probabilities after transformers' processors and warpers."""
    transformers = importlib.import_module("transformers")
    makers = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    for name, make in makers.items():
        if name in params:
            logits = make(params[name])(prompt, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("vocabulary", [40, 5000])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_k": 9000},
        {"temperature": 1.0, "top_p": 0.3},
        {"temperature": 4.0, "top_p": 0.95},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 0.9, "min_p": 0.2},
        {"temperature": 1.0, "min_p": 1.0},
        {"repetition_penalty": 1.5, "temperature": 1.0},
        {"repetition_penalty": 0.6, "temperature": 1.0},
        {"repetition_penalty": 1.2, "temperature": 1.4, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_each_parameter_gives_the_probabilities_of_transformers(params, vocabulary):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, vocabulary, generator=generator)
    prompt = torch.randint(0, vocabulary, (3, 12), generator=generator)
    expected = warped(logits.clone(), prompt, **params)
    settled = SamplingParams(**params)
    present = torch.zeros(3, vocabulary, dtype=torch.bool).scatter(1, prompt, True)
    scores = logits
    penalty = settled.repetition_penalty
    if penalty != 1:  # as in CTRL (Keskar et al. 2019), with its sign corrected
        scores = logits.clone()
        for row, ids in enumerate(prompt.tolist()):
            for token in set(ids):
                value = scores[row, token]
                scores[row, token] = value / penalty if value > 0 else value * penalty
    ours = probabilities(scores, settled)
    ours = ours / ours.sum(-1, keepdim=True)
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    # `sample_next` applies the same penalty, greedily and in a thousand draws.
    greedy = SamplingParams(temperature=0, repetition_penalty=penalty)
    assert torch.equal(sample_next(logits, greedy, torch.zeros(3), present).ids, scores.argmax(-1))
    numbers = uniforms(5, 1000)
    drawn = [sample_next(logits, settled, u.expand(3), present).ids for u in numbers]
    for row in range(3):
        assert (expected[row, torch.stack(drawn)[:, row]] > 0).all()


def test_top_k_and_top_p_keep_ties_with_the_last_token():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert (probabilities(logits, SamplingParams(temperature=1, top_k=2)) > 0).tolist() == [
        [True, True, True, False]
    ]
    assert (probabilities(logits, SamplingParams(temperature=1, top_p=0.7)) > 0).tolist() == [
        [True, True, True, False]
    ]


def test_frequencies_follow_the_probabilities():
    likely = torch.tensor([0.7, 0.0, 0.2, 0.1]).expand(4000, 4)
    drawn = draw(likely, uniforms(0, 4000))
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.0, 0.2, 0.1]), atol=0.03, rtol=0)


def test_a_draw_inverts_the_cumulative_distribution():
    likely = torch.tensor([[0.0, 0.5, 0.25, 0.25, 0.0]])
    for share, token in ((0.0, 1), (0.499, 1), (0.5, 2), (0.75, 3), (1 - 2**-53, 3)):
        number = torch.tensor([share], dtype=torch.float64)
        assert draw(likely, number).tolist() == [token]


def test_a_seeds_numbers_do_not_depend_on_how_many_are_drawn():
    assert torch.equal(uniforms(7, 3), uniforms(7, 500)[:3])
    assert not torch.equal(uniforms(7, 3), uniforms(8, 3))


def test_log_probabilities_are_those_before_temperature_and_top_k():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    choice = sample_next(
        logits, SamplingParams(temperature=0.1, top_k=1), torch.tensor([0.5]), None
    )
    assert choice.ids.tolist() == [1]
    torch.testing.assert_close(choice.logprobs, logits.log_softmax(-1)[:, 1])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_give_no_token(broken, temperature):
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, broken, 2.0]])
    choice = sample_next(
        logits, SamplingParams(temperature=temperature), torch.tensor([0.1, 0.1]), None
    )
    assert (choice.ids >= 0).tolist() == [True, False]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0},
     {"top_p": 1.5}, {"min_p": 0.0}, {"min_p": 2.0}, {"repetition_penalty": 0.0},
     {"max_tokens": 0}, {"seed": -1}, {"stop": ("",)}],
    ids=str,
)  # fmt: skip
def test_sampling_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("_", "-")):
        SamplingParams(**wrong)
