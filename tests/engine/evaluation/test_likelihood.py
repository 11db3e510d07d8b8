"""Log-likelihoods, compared with sums over transformers' logits, and continuations."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer
from pretrain_cli.engine.evaluation import likelihood
from pretrain_cli.engine.evaluation.likelihood import Scorer, Span
from pretrain_cli.engine.sampling.sample import open_for_sampling
from pretrain_cli.engine.sampling.sampler import SamplingParams
from tests.model.conftest import GEMMA, draw_wide

ROWS = 260
POSITIONS = 48
BEGIN, END = 258, 256


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a Gemma 3 model of transformers, saved in a folder with the byte tokenizer."""
    transformers = importlib.import_module("transformers")
    numbers = GEMMA | {"vocab_size": ROWS, "num_key_value_heads": 2}
    config = transformers.Gemma3TextConfig(**numbers, attn_implementation="eager")
    model = transformers.Gemma3ForCausalLM(config).eval()
    draw_wide(model)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    load_tokenizer("bytes").save(folder)
    model.folder = folder
    return model


@pytest.fixture
def scorer(theirs: Any) -> Scorer:
    where = Path(theirs.folder)
    said: list[str] = []
    _, model, tokenizer = open_for_sampling(
        where, device="cpu", dtype="float32", notify=said.append
    )
    return Scorer(model, tokenizer, POSITIONS)


def by_hand(theirs: Any, tokens: list[int], asked: int) -> tuple[float, bool]:
    """Return the sum of the last `asked` tokens' log-probabilities, and whether all are greedy."""
    with torch.no_grad():
        logits = theirs(torch.tensor([tokens[:-1]])).logits[0, -asked:]
    targets = torch.tensor(tokens[-asked:])
    chosen = logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1))
    return chosen.sum().item(), bool((logits.argmax(-1) == targets).all())


def found(scorer: Scorer, spans: list[Span]) -> list[tuple[float, bool]]:
    out = dict(scorer.likelihoods(spans))
    return [(out[n].logprob, out[n].is_greedy) for n in range(len(spans))]


@pytest.mark.parametrize("begins", [False, True])
def test_likelihoods_of_continuations_equal_transformers(theirs, scorer, begins):
    if begins:
        scorer.tokenizer = replace(scorer.tokenizer, bos=BEGIN)
    mark = [BEGIN] if begins else []
    pairs = [("the cat", " sat on the mat"), ("", "a word"), ("x", "y"), ("a ", "b"), ("long", "é")]
    expected = [
        by_hand(theirs, [*(mark or ([] if context else [END])), *(context + text).encode()], asked)
        for (context, text), asked in zip(pairs, (15, 6, 1, 2, 2), strict=True)
    ]
    spans = [scorer.continuation(*pair) for pair in pairs]
    for (logprob, is_greedy), (theirs_logprob, theirs_greedy) in zip(
        found(scorer, spans), expected, strict=True
    ):
        assert logprob == pytest.approx(theirs_logprob, rel=1e-5)
        assert is_greedy == theirs_greedy


def test_greedy_continuations_are_recognized(theirs, scorer):
    prompt = list(b"the cat")
    with torch.no_grad():
        best = int(theirs(torch.tensor([prompt])).logits[0, -1].argmax())
        other = (best + 1) % 256
        then = int(theirs(torch.tensor([[*prompt, other]])).logits[0, -1].argmax())
    spans = [Span([*prompt, *more], len(more)) for more in ([best], [other], [other, then])]
    assert [is_greedy for _, is_greedy in found(scorer, spans)] == [True, False, False]


def test_an_empty_continuation_has_log_probability_zero(scorer):
    assert found(scorer, [scorer.continuation("the cat", "")]) == [(0.0, True)]


def test_batching_changes_no_likelihood_and_shares_equal_contexts(theirs, scorer, monkeypatch):
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 40)
    monkeypatch.setattr(likelihood, "ROWS_OF_LOGITS", 3)
    texts = ["a", " lot of different texts", "of several lengths, one after the other", "b", "c"]
    spans = [scorer.continuation("question:", text) for text in texts]
    read = []
    hidden = scorer.model.hidden
    monkeypatch.setattr(
        scorer.model, "hidden", lambda tokens, *a: read.append(tokens.shape) or hidden(tokens, *a)
    )
    for (logprob, _), span in zip(found(scorer, spans), spans, strict=True):
        assert logprob == pytest.approx(by_hand(theirs, span.tokens, span.scored)[0], rel=1e-5)
    assert sum(rows for rows, _ in read) == 3  # "a", "b" and "c" share a row: equal contexts


def test_a_long_context_is_truncated_at_its_beginning(theirs, scorer):
    span = scorer.continuation("x" * 100, "yz")
    [(logprob, _)] = found(scorer, [span])
    assert logprob == pytest.approx(by_hand(theirs, span.tokens[-POSITIONS - 1 :], 2)[0], rel=1e-5)


@pytest.mark.parametrize("length", [1, POSITIONS - 1, POSITIONS, POSITIONS + 1, 2 * POSITIONS + 5])
def test_windows_score_every_token_of_a_text_once(theirs, scorer, length):
    text = "the quick brown fox jumps over the lazy dog; " * 3
    text = text[:length]
    spans = scorer.windows(text)
    assert sum(span.scored for span in spans) == length
    tokens, expected, known = [END, *text.encode()], 0.0, 1
    while known < len(tokens):  # as in lm-eval, the last window is as long as the others
        end = min(known + POSITIONS, len(tokens))
        expected += by_hand(theirs, tokens[max(0, end - POSITIONS - 1) : end], end - known)[0]
        known = end
    assert sum(logprob for logprob, _ in found(scorer, spans)) == pytest.approx(expected, rel=1e-5)


def test_generation_equals_transformers_greedy_text_up_to_a_stop(theirs, scorer):
    prompts = ["the cat sat", "y" * 70, "a"]
    limit = 10
    expected = []
    for prompt in prompts:
        ids = list(prompt.encode())[-(POSITIONS - limit) :]
        out = theirs.generate(
            torch.tensor([ids]), max_new_tokens=limit, do_sample=False, eos_token_id=END,
            pad_token_id=0,
        )[0, len(ids) :].tolist()  # fmt: skip
        expected.append(scorer.tokenizer.decode(out[: out.index(END)] if END in out else out))
    params = SamplingParams(max_tokens=limit, temperature=0)
    assert [text for _, text in sorted(scorer.generate(prompts, params))] == expected
    stop = expected[0][3:5]
    [(_, text)] = scorer.generate(prompts[:1], replace(params, stop=(stop,)))
    assert text == expected[0][: expected[0].index(stop)]
