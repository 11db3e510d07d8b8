"""Continuous batching: texts generated together equal the same texts generated alone."""

import pytest
import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.runtime.speed import build_model, resolve_speed
from pretrain_cli.engine.sampling import batch
from pretrain_cli.engine.sampling.batch import Completion, ContinuousBatch
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.errors import CheckpointError
from pretrain_cli.model.config import variant
from pretrain_cli.model.inference.decode import DecodeSession
from pretrain_cli.model.presets import preset

CPU = torch.device("cpu")
V = 300


@pytest.fixture(scope="module", params=["gemma3-tiny", "qwen3-tiny"])
def model(request):
    config = variant(
        preset(request.param),
        {"hidden_size": 32, "vocab_size": V, "max_position_embeddings": 128,
         "initializer_range": 0.3, "pad_token_id": None},
    )  # fmt: skip
    if config.sliding_window:
        config = variant(config, {"sliding_window": 6})
    model = build_model(config, resolve_speed(SpeedConfig(dtype="float32"), CPU), CPU)
    model.initialize(0)
    return model.eval()


def texts_of(prompts, limit=20, seed=0, reason="max-tokens"):
    return [Completion(i, ids, limit, reason, seed + i) for i, ids in enumerate(prompts)]


def finish(model, texts, params, *, rows, end=-1, known=V, until=None):
    capacity = max(len(text.prompt) + text.limit for text in texts)
    running = ContinuousBatch(
        DecodeSession(model), params, rows=rows, capacity=capacity, eos=end, vocab_size=known
    )
    told: dict[int, list] = {text.number: [] for text in texts}
    for text, token in running.run(texts):
        told[text.number].append(token)
        if until is not None and until(text):
            text.stopped = "stop"
    for text in texts:
        assert [token for token in told[text.number] if token is not None] == text.tokens
        assert len(text.logprobs) == len(text.tokens)
    return texts


@torch.no_grad()
def greedy(model, prompt, count):
    """Generate greedily without a cache: every token computes the whole text again."""
    tokens, logprobs = list(prompt), []
    for _ in range(count):
        last = model(torch.tensor([tokens]), last_only=True)[0, -1].float()
        tokens.append(int(last.argmax()))
        logprobs.append(float(last.log_softmax(-1).max()))
    return tokens[len(prompt) :], logprobs


LENGTHS = (1, 5, 6, 7, 12, 13, 30, 41, 2, 6, 19, 40, 8, 3, 25, 33, 10, 4, 9, 50)
PROMPTS = [
    [(7 * i + k) % 250 for i in range(length)] for k, length in enumerate(LENGTHS)
]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_greedy_texts_of_a_ragged_batch_equal_those_without_a_cache(model, rows):
    texts = finish(model, texts_of(PROMPTS), SamplingParams(temperature=0), rows=rows)
    for text in texts:
        tokens, logprobs = greedy(model, text.prompt, 20)
        assert text.tokens == tokens
        torch.testing.assert_close(
            torch.tensor(text.logprobs), torch.tensor(logprobs), rtol=1e-3, atol=1e-4
        )
        assert text.stopped == "max-tokens"


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9, "repetition_penalty": 1.3}], ids=str)
def test_a_text_depends_on_its_seed_and_not_on_its_batch(model, params):
    hot = SamplingParams(temperature=1.5, **params)
    together = finish(model, texts_of(PROMPTS, seed=40), hot, rows=6)
    for text in together[::3]:
        alone = Completion(0, text.prompt, 20, "max-tokens", text.seed)
        finish(model, [alone], hot, rows=1)
        assert alone.tokens == text.tokens
    other = finish(model, texts_of(PROMPTS, seed=90), hot, rows=6)
    assert [text.tokens for text in other] != [text.tokens for text in together]


def test_texts_of_one_prompt_are_prefilled_once_and_differ(model, monkeypatch):
    prefilled = []
    whole = DecodeSession.prefill

    def counted(self, cache, prompts):
        prefilled.append(prompts)
        return whole(self, cache, prompts)

    monkeypatch.setattr(DecodeSession, "prefill", counted)
    texts = texts_of([PROMPTS[7]] * 10)
    finish(model, texts, SamplingParams(temperature=1.5), rows=3)
    assert prefilled == [[PROMPTS[7]]]
    assert len({tuple(text.tokens) for text in texts}) == 10
    for text in texts[::4]:
        alone = Completion(0, text.prompt, 20, "max-tokens", text.seed)
        assert (
            finish(model, [alone], SamplingParams(temperature=1.5), rows=1)[0].tokens == text.tokens
        )


def test_prompts_of_similar_lengths_are_prefilled_together():
    groups = list(batch._groups([[0] * n for n in (10, 100, 90, 4, 76, 9, 74)]))
    assert [[len(prompt) for prompt in group] for group in groups] == [
        [100, 90, 76], [74], [10, 9], [4],
    ]  # fmt: skip


def test_each_text_ends_for_its_own_reason_and_the_others_continue(model):
    expected = [greedy(model, prompt, 20)[0] for prompt in PROMPTS[:6]]
    end = expected[2][4]
    texts = texts_of(PROMPTS[:6])
    texts[1].limit, texts[1].reason = 3, "positions"
    finish(model, texts, SamplingParams(temperature=0), rows=2, end=end,
           until=lambda text: text.number == 0 and len(text.tokens) == 2)  # fmt: skip
    for text, tokens in zip(texts, expected, strict=True):
        limit = {0: 2, 1: 3}.get(text.number, 20)
        until_end = tokens.index(end) if end in tokens[:limit] else limit
        assert text.tokens == tokens[: min(limit, until_end)]
        is_end = end in tokens[:limit]
        assert text.stopped == (
            "end" if is_end else {0: "stop", 1: "positions"}.get(text.number, "max-tokens")
        )
    assert texts[2].stopped == "end"


def test_tokens_fetched_late_give_the_same_texts(model, monkeypatch):
    """Simulates a GPU, where the CPU sees the end of a text some steps after it was sampled."""
    expected = [greedy(model, prompt, 20)[0] for prompt in PROMPTS[:6]]
    end = expected[2][4]
    plain = finish(model, texts_of(PROMPTS[:6]), SamplingParams(temperature=0), rows=2, end=end)
    init = ContinuousBatch.__init__

    def late(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.fetch_lag = 4

    monkeypatch.setattr(ContinuousBatch, "__init__", late)
    texts = finish(model, texts_of(PROMPTS[:6]), SamplingParams(temperature=0), rows=2, end=end)
    assert [(t.tokens, t.stopped) for t in texts] == [(t.tokens, t.stopped) for t in plain]


def test_padding_rows_of_the_vocabulary_are_never_sampled(model):
    texts = finish(
        model, texts_of(PROMPTS[:3], limit=60), SamplingParams(temperature=100), rows=3, known=10
    )
    assert all(token < 10 for text in texts for token in text.tokens)


def test_a_model_with_nan_weights_raises_checkpoint_error(model):
    broken = build_model(model.config, resolve_speed(SpeedConfig(dtype="float32"), CPU), CPU)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        finish(broken.eval(), texts_of(PROMPTS[:2]), SamplingParams(temperature=0), rows=2)
