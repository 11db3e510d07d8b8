"""Local lm-eval tasks: scores and likelihoods equal transformers'."""

import importlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain_cli.engine.evaluation.likelihood import Scorer
from pretrain_cli.engine.evaluation.lm_eval import (
    TaskRequest,
    TaskResult,
    _sampling_params,
    evaluate_tasks,
)
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.errors import ConfigError
from tests.engine.evaluation.conftest import (
    CHECKPOINT,
    QUESTIONS,
    cache_datasets_in,
    write_tasks,
)

END = 256
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)
quietly = pytest.mark.filterwarnings("ignore")  # warnings from lm-eval's imports


@pytest.fixture
def tasks(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write three tasks into a subfolder of the current folder; return that folder."""
    cache_datasets_in(trained / "cache", monkeypatch)
    return write_tasks(trained / "tasks")


def scores(*names: str, include_path: Path | None = None) -> TaskResult:
    request = TaskRequest(tasks=names, include_path=include_path, dtype="float32")
    return evaluate_tasks(request, lambda _: None)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return the log-probabilities that lm-eval received, by context and continuation."""
    scored: dict[str, float] = {}
    likelihoods = Scorer.likelihoods

    def watched(self: Scorer, spans: Any) -> Any:
        results = dict(likelihoods(self, spans))
        for number, result in results.items():
            scored[bytes(spans[number].tokens).decode()] = result.logprob
        return results.items()

    monkeypatch.setattr(Scorer, "likelihoods", watched)
    return scored


@pytest.fixture
def theirs(trained: Path) -> Any:
    transformers = importlib.import_module("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


def likelihood(theirs: Any, context: str, text: str) -> float:
    """Return the log-probability of the text's bytes after the context's."""
    ids = list(context.encode() or [END]) + list(text.encode())
    with torch.no_grad():
        log_probs = theirs(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    count = len(text.encode())
    targets = torch.tensor(ids[-count:]).unsqueeze(-1)
    return log_probs[-count:].gather(-1, targets).sum().item()


@needs_harness
@quietly
def test_accuracy_and_likelihoods_equal_transformers(tasks, theirs, scored):
    result = scores("bottles", include_path=tasks)
    right, right_by_length = 0, 0
    for row in QUESTIONS:
        expected = [likelihood(theirs, row["question"], f" {text}") for text in row["choices"]]
        for text, value in zip(row["choices"], expected, strict=True):
            assert scored[f"{row['question']} {text}"] == pytest.approx(value, abs=1e-3)
        by_length = [x / len(text) for x, text in zip(expected, row["choices"], strict=True)]
        right += expected.index(max(expected)) == row["answer"]
        right_by_length += by_length.index(max(by_length)) == row["answer"]
    assert 0 < right < 4  # else any answer would pass
    assert result.folder == CHECKPOINT
    values = {score.measure: score for score in result.scores}
    assert values["acc"].value == right / 4
    assert values["acc_norm"].value == right_by_length / 4
    stderr = math.sqrt(right / 4 * (1 - right / 4) / 3)
    assert values["acc"].stderr == pytest.approx(stderr, rel=1e-6)
    assert values["acc"].questions == 4


@needs_harness
@quietly
def test_few_shot_examples_precede_a_question(tasks, theirs, scored):
    """Two examples come from another file; lm-eval puts an empty line after each."""
    examples = [
        {"question": "7 green bottles hanging on the", "choices": ["wall", "cat"], "answer": 0},
        {"question": "And if one green", "choices": ["dog", "bottle"], "answer": 1},
        {"question": "never shown", "choices": ["a", "b"], "answer": 0},
    ]
    rows = "".join(json.dumps(row) + "\n" for row in examples)
    (tasks / "examples.jsonl").write_text(rows)
    zero_shot = (tasks / "bottles.yaml").read_text()
    (tasks / "shown.yaml").write_text(
        zero_shot.replace("task: bottles", "task: shown").replace(
            "data_files: {", f"data_files: {{train: {tasks}/examples.jsonl, "
        )
        + "num_fewshot: 2\nfewshot_split: train\nfewshot_config: {sampler: first_n}\n"
    )
    result = scores(f"{tasks}/shown.yaml")
    before = "7 green bottles hanging on the wall\n\nAnd if one green bottle\n\n"
    expected, right = {}, 0
    for row in QUESTIONS:
        context = before + row["question"]
        values = [likelihood(theirs, context, f" {text}") for text in row["choices"]]
        right += values.index(max(values)) == row["answer"]
        for text, value in zip(row["choices"], values, strict=True):
            expected[f"{context} {text}"] = value
    assert scored == pytest.approx(expected, abs=1e-3)
    assert (result.scores[0].value, result.scores[0].shots) == (right / 4, 2)


@needs_harness
@quietly
def test_bits_per_byte_and_generated_answers_equal_transformers(tasks, theirs):
    result = scores(f"{tasks}/song.yaml", f"{tasks}/written.yaml")
    values = {score.task: score.value for score in result.scores}
    texts = [row["question"] for row in QUESTIONS]
    nats = -sum(likelihood(theirs, "", text) for text in texts)
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert values["song"] == pytest.approx(bits, rel=1e-4)
    right = 0
    for text in texts:
        ids = torch.tensor([list(text.encode())])
        out = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=END,
                              pad_token_id=0)[0, ids.shape[1] :].tolist()  # fmt: skip
        right += bytes(id for id in out if id < END).decode().split(",")[0] == " wall"
    assert values["written"] == right / 4
    assert right


def test_generation_settings_of_tasks_are_translated_or_refused():
    assert _sampling_params({"until": ["\n", ""], "max_gen_toks": 5}) == SamplingParams(
        max_tokens=5, temperature=0.0, stop=("\n",)
    )
    hot = _sampling_params({"until": "Q:", "do_sample": True, "temperature": 0.6, "top_p": 0.9})
    assert (hot.temperature, hot.top_p, hot.stop, hot.max_tokens) == (0.6, 0.9, ("Q:",), 256)
    assert _sampling_params({"temperature": 0.6}).temperature == 0.0  # without do_sample
    with pytest.raises(ConfigError, match="a task sets num_beams for its answers"):
        _sampling_params({"num_beams": 4})
