"""Generation from prompts: planning, streaming, stop strings, and when to compile."""

import math

import pytest
import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer
from pretrain_cli.engine.runtime.speed import build_model, resolve_speed
from pretrain_cli.engine.sampling import sample
from pretrain_cli.engine.sampling.sample import (
    decide_compile,
    generate_text,
    plan_completions,
    read_prompts,
    sample_text,
    worth_compiling,
)
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.errors import ConfigError, DataError
from pretrain_cli.model.config import variant
from pretrain_cli.model.inference.decode import DecodeSession
from pretrain_cli.model.presets import preset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    config = variant(
        preset("gemma3-tiny"),
        {"hidden_size": 32, "vocab_size": 320, "max_position_embeddings": 64,
         "initializer_range": 0.3, "pad_token_id": None, "sliding_window": 6},
    )  # fmt: skip
    model = build_model(config, resolve_speed(SpeedConfig(dtype="float32"), CPU), CPU)
    model.initialize(0)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


def test_the_same_seed_gives_the_same_text(model, tokenizer):
    def text(seed):
        params = SamplingParams(max_tokens=20, temperature=2, seed=seed)
        return "".join(sample_text(model, tokenizer, "def", params))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_completions_are_planned_in_order_with_seeds_and_limits(model, tokenizer):
    params = SamplingParams(max_tokens=30, seed=5)
    texts = plan_completions(model, tokenizer, ["a" * 10, "b" * 50], params, n=2)
    assert [text.prompt[0] for text in texts] == [97, 97, 98, 98]
    assert [text.seed for text in texts] == [5, 6, 7, 8]
    assert [(text.limit, text.reason) for text in texts] == [
        (30, "max-tokens"), (30, "max-tokens"), (14, "positions"), (14, "positions"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"--prompt: its 64 tokens fill the model's 64 positions"):
        plan_completions(model, tokenizer, ["x" * 64], params)
    with pytest.raises(ConfigError, match=r"--prompt \(number 2\): its 70 tokens"):
        plan_completions(model, tokenizer, ["x", "x" * 70], params)
    for half in ("\ud83d", b"\xff".decode(errors="surrogateescape")):
        with pytest.raises(
            ConfigError, match=r"--prompt \(number 2\): not UTF-8, or half of a char"
        ):
            plan_completions(model, tokenizer, ["x", "a" + half], params)


def test_a_stop_string_ends_only_the_text_that_holds_it(model, tokenizer):
    params = SamplingParams(max_tokens=30, temperature=2, seed=3)
    texts = plan_completions(model, tokenizer, ["a", "b"], params)
    whole = {}
    for delta in generate_text(DecodeSession(model), tokenizer, texts, params, rows=2):
        if delta.full_text is not None:
            whole[delta.completion.number] = delta.full_text
    string = whole[0][6:8]
    stopping = SamplingParams(max_tokens=30, temperature=2, seed=3, stop=("never so", string))
    texts = plan_completions(model, tokenizer, ["a", "b"], stopping)
    shown = {0: "", 1: ""}
    for delta in generate_text(DecodeSession(model), tokenizer, texts, stopping, rows=2):
        shown[delta.completion.number] += delta.text
        if delta.full_text is not None:
            assert delta.full_text == shown[delta.completion.number]
    assert shown[0] == whole[0][: whole[0].find(string)]
    assert texts[0].stopped == "stop"
    assert len(texts[0].tokens) < 30
    assert shown[1] == whole[1].partition(string)[0]


def test_an_incomplete_stop_string_at_the_end_is_returned(model, tokenizer):
    params = SamplingParams(max_tokens=12, temperature=2, seed=3)
    plain = "".join(sample_text(model, tokenizer, "a", params))
    begun = SamplingParams(max_tokens=12, temperature=2, seed=3, stop=(plain[-2:] + "never so",))
    assert "".join(sample_text(model, tokenizer, "a", begun)) == plain


def test_sampling_does_not_change_the_model(model, tokenizer):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    "".join(sample_text(model, tokenizer, "a", SamplingParams(max_tokens=3)))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_prompts_are_lines_or_json_lines(tmp_path):
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text('one\n\n  two \n{"prompt": "three"}\n')
    assert read_prompts(plain) == ["one", "  two ", '{"prompt": "three"}']
    plain.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")  # as Windows writes it
    assert read_prompts(plain) == ["one", "two"]
    lines.write_text('{"prompt": "a\\nb", "id": 7}\n\n{"prompt": ""}\n')
    assert read_prompts(lines) == ["a\nb", ""]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"text": "b"}', r'line 2: no text as "prompt"'),
        ('{"prompt": 5}', r'line 1: no text as "prompt"'),
        ("{prompt", "line 1: not JSON"),
        ("\n \n", "holds none"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(tmp_path, text, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_prompts(path)
    with pytest.raises(DataError, match="No such file"):
        read_prompts(tmp_path / "nowhere.txt")


def test_compiling_starts_at_one_to_two_times_the_break_even_steps():
    """Break-even steps are compile time / time saved per token, in tokens/s of `pretrain benchmark
    sample` with and without --compile: gemma3-tiny in float32, gemma3-270m in bfloat16."""
    for name, seconds, compiled, plain in (
        ("gemma3-tiny", 10, 402.6, 162.9),
        ("gemma3-270m", 11, 42.1, 24.8),
    ):
        even = seconds / (1 / plain - 1 / compiled)
        assert even < worth_compiling(preset(name)) < 2 * even


def test_compile_is_chosen_for_long_texts_or_on_request(model, tokenizer, monkeypatch):
    def decided(asked, limit, rows=1, count=1):
        texts = plan_completions(model, tokenizer, ["a"] * count, SamplingParams())
        for text in texts:
            text.limit = limit
        return decide_compile(model, asked, texts, rows)

    worth = math.ceil(worth_compiling(model.config))
    assert decided(None, worth) == (True, f"up to {worth:,} steps")
    assert decided(None, worth - 1)[0] is False
    assert decided(None, worth // 2 + 1, count=8, rows=4)[0] is True  # two texts for each row
    assert decided(None, worth // 2, count=4, rows=8)[0] is False
    assert decided(True, 1)[0] is True
    assert decided(False, 10 * worth)[0] is False
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert decided(True, 1) == (False, "no C++ compiler is installed (g++ or clang++)")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "rows"), [("gemma3-tiny", 3), ("qwen3-tiny", 1)])
def test_a_compiled_step_gives_the_same_tokens(tokenizer, family, rows):
    """Over 600 tokens a full layer's buffer grows, and no new size recompiles the step."""
    config = variant(
        preset(family),
        {"hidden_size": 32, "vocab_size": 320, "num_hidden_layers": 6 if "gemma" in family else 2,
         "initializer_range": 0.3, "pad_token_id": None},
    )  # fmt: skip
    speed = resolve_speed(SpeedConfig(dtype="float32"), CPU, training=False)
    params = SamplingParams(max_tokens=600, temperature=0)
    made, said = [], []
    for compiled in (False, True):
        model = build_model(config, speed, CPU)
        model.initialize(0)
        texts = plan_completions(model.eval(), tokenizer, ["ab", "def", "x" * 40], params)
        torch._dynamo.utils.counters.clear()
        writer = sample.open_session(model, compiled, texts, rows, said.append)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == compiled * (3 if "gemma" in family else 2)  # block kinds and head
        with torch.compiler.set_stance("fail_on_recompile" if compiled else "default"):
            for _ in generate_text(writer, tokenizer, texts, params, rows=rows):
                pass
        made.append([text.tokens for text in texts])
    assert "Compiled in" in said[0]
    assert made[0] == made[1]


@pytest.mark.gpu
def test_a_cuda_graph_gives_the_same_tokens(tokenizer):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cuda = torch.device("cuda")
    config = variant(preset("gemma3-tiny"), {"vocab_size": 320, "pad_token_id": None})
    params = SamplingParams(max_tokens=60, temperature=0)
    made = []
    for compiled in (False, True):
        model = build_model(config, resolve_speed(SpeedConfig(dtype="float32"), cuda), cuda)
        model.initialize(0)
        texts = plan_completions(model.eval(), tokenizer, ["ab", "def", "x" * 40], params)
        writer = sample.open_session(model, compiled, texts, 2, print)
        for _ in generate_text(writer, tokenizer, texts, params, rows=2):
            pass
        made.append([text.tokens for text in texts])
    assert made[0] == made[1]
