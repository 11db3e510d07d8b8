"""`pretrain evaluate --tasks`: small tasks on this disk, and what transformers answers to them."""

import importlib
import importlib.util
import json
import math
import sys

import pytest
import torch

from pretrain_cli.engine.evaluation.likelihood import Scorer
from pretrain_cli.engine.evaluation.lm_eval import _sampling_params
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.errors import ConfigError

CHECKPOINT = "runs/tiny/checkpoints/step-000060"
QUESTIONS = [
    {"question": "12 green bottles hanging on the", "choices": ["wall", "tree"], "answer": 0},
    {"question": "And if one green bottle", "choices": ["x", "should accidentally"], "answer": 1},
    {"question": "There'll be 3 green", "choices": ["cats", "bottles hanging"], "answer": 1},
    {"question": "5 green bottles", "choices": ["zzzz qqqq", "hanging"], "answer": 0},
]  # fmt: skip
END = 256
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)
quietly = pytest.mark.filterwarnings("ignore")  # of the harness's own imports


@pytest.fixture
def tasks(trained, monkeypatch):
    """Three tasks with their questions in files: of choices, of whole texts, of written answers."""
    datasets = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", trained / "cache")
    folder = trained / "tasks"
    folder.mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (folder / "questions.jsonl").write_text(rows)
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}\n"
        "test_split: test\n"
    )
    (folder / "bottles.yaml").write_text(
        f"task: bottles\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "song.yaml").write_text(
        f"task: song\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{question}}'\nmetric_list: [{metric: bits_per_byte}]\n"
    )
    (folder / "written.yaml").write_text(
        f"task: written\n{common}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: ' wall'\n"
        "generation_kwargs: {until: [','], max_gen_toks: 8, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    return folder


@pytest.fixture
def theirs(trained):
    transformers = importlib.import_module("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


def likelihood(theirs, context, text):
    """The log-probability of the text's bytes behind the context's."""
    ids = list(context.encode() or [END]) + list(text.encode())
    with torch.no_grad():
        likely = theirs(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    count = len(text.encode())
    return likely[-count:].gather(-1, torch.tensor(ids[-count:]).unsqueeze(-1)).sum().item()


@needs_harness
@quietly
def test_accuracy_and_likelihoods_are_transformers(pretrain, tasks, theirs, monkeypatch):
    told = {}
    ours = Scorer.likelihoods

    def watched(self, spans):
        found = dict(ours(self, spans))
        told.update({bytes(spans[n].tokens): each.logprob for n, each in found.items()})
        return found.items()

    monkeypatch.setattr(Scorer, "likelihoods", watched)
    line = f"evaluate --tasks bottles --include-path {tasks} --dtype float32 --json"
    outcome = pretrain(line)
    assert outcome.code == 0, outcome.err
    right, right_by_length = 0, 0
    for row in QUESTIONS:
        found = [likelihood(theirs, row["question"], f" {text}") for text in row["choices"]]
        for text, value in zip(row["choices"], found, strict=True):
            whole = f"{row['question']} {text}".encode()
            assert told[whole] == pytest.approx(value, abs=1e-3)
        by_length = [x / len(text) for x, text in zip(found, row["choices"], strict=True)]
        right += found.index(max(found)) == row["answer"]
        right_by_length += by_length.index(max(by_length)) == row["answer"]
    assert 0 < right < 4  # or any answer would do
    result = json.loads(outcome.out)
    assert result["checkpoint"] == CHECKPOINT
    values = {score["measure"]: score for score in result["scores"]}
    assert values["acc"]["value"] == right / 4
    assert values["acc_norm"]["value"] == right_by_length / 4
    assert values["acc"]["stderr"] == pytest.approx(
        math.sqrt(right / 4 * (1 - right / 4) / 3), rel=1e-6
    )
    assert values["acc"]["questions"] == 4


@needs_harness
@quietly
def test_examples_are_shown_before_a_question(pretrain, tasks, theirs, monkeypatch):
    """Two of another file, as the harness puts them: question and answer, an empty line between."""
    examples = [
        {"question": "7 green bottles hanging on the", "choices": ["wall", "cat"], "answer": 0},
        {"question": "And if one green", "choices": ["dog", "bottle"], "answer": 1},
        {"question": "never shown", "choices": ["a", "b"], "answer": 0},
    ]
    rows = "".join(json.dumps(row) + "\n" for row in examples)
    (tasks / "examples.jsonl").write_text(rows)
    alone = (tasks / "bottles.yaml").read_text()
    (tasks / "shown.yaml").write_text(
        alone.replace("task: bottles", "task: shown").replace(
            "data_files: {", f"data_files: {{train: {tasks}/examples.jsonl, "
        )
        + "num_fewshot: 2\nfewshot_split: train\nfewshot_config: {sampler: first_n}\n"
    )
    told = []
    ours = Scorer.likelihoods

    def watched(self, spans):
        found = dict(ours(self, spans))
        told.extend((bytes(spans[n].tokens).decode(), each.logprob) for n, each in found.items())
        return found.items()

    monkeypatch.setattr(Scorer, "likelihoods", watched)
    outcome = pretrain(f"evaluate --tasks {tasks}/shown.yaml --dtype float32 --json")
    assert outcome.code == 0, outcome.err
    before = "7 green bottles hanging on the wall\n\nAnd if one green bottle\n\n"
    expected, right = [], 0
    for row in QUESTIONS:
        context = before + row["question"]
        found = [likelihood(theirs, context, f" {text}") for text in row["choices"]]
        right += found.index(max(found)) == row["answer"]
        expected += [
            (f"{context} {text}", pytest.approx(value, abs=1e-3))
            for text, value in zip(row["choices"], found, strict=True)
        ]
    assert sorted(told) == sorted(expected, key=lambda pair: pair[0])
    accuracy = json.loads(outcome.out)["scores"][0]
    assert (accuracy["value"], accuracy["shots"]) == (right / 4, 2)


@needs_harness
@quietly
def test_whole_texts_and_written_answers(pretrain, tasks, theirs):
    outcome = pretrain(
        f"evaluate --tasks {tasks}/song.yaml,{tasks}/written.yaml --dtype float32 --json"
    )
    assert outcome.code == 0, outcome.err
    values = {score["task"]: score["value"] for score in json.loads(outcome.out)["scores"]}
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


@needs_harness
@quietly
def test_so_many_questions_in_a_table(pretrain, tasks):
    outcome = pretrain(f"evaluate --tasks {tasks}/bottles.yaml --limit 2 --seq-len 64")
    assert outcome.code == 0, outcome.err
    assert "texts of up to 64 tokens, float32, lm-eval " in outcome.out
    [row] = [line for line in outcome.out.splitlines() if "bottles" in line and "acc" in line]
    assert [cell.strip() for cell in row.split("│")][-3:-1] == ["2", "0"]


@needs_harness
@quietly
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tasks botles --include-path tasks", "'botles' is no task that lm-eval knows; did you "
         "mean bottles?"),
        ("--tasks none.yaml", "none.yaml: no such file"),
        ("--tasks bottles --include-path nowhere", "--include-path: nowhere is no folder"),
        ("--tasks tasks/lost.yaml", "can't be loaded ("),
        ("--tasks tasks/bottles.yaml --limit 0", "--limit: 0 is not at least 1"),
        ("--tasks tasks/bottles.yaml --seq-len 9999", "is beyond the model's"),
        ("--tasks tasks/bottles.yaml --quantize int4", "'int4' is not int8"),
        ("--tasks tasks/bottles.yaml --data data/corpus", "--data: is of the validation loss"),
        ("--limit 3", "--limit: is of --tasks, which was not given"),
        ("--tasks a,,b", "--tasks: 'a,,b' has an empty name"),
    ],
)  # fmt: skip
def test_what_is_no_task_is_refused(refused, tasks, options, said):
    (tasks / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: lost.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: x\nmetric_list: [{metric: bits_per_byte}]\n"
    )
    assert said in refused(f"evaluate {options}")


@pytest.mark.usefixtures("trained")
def test_without_the_harness_it_says_what_to_install(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'pretrain[eval]'" in refused("evaluate --tasks hellaswag")


def test_how_a_task_has_answers_written_is_understood_or_refused():
    assert _sampling_params({"until": ["\n", ""], "max_gen_toks": 5}) == SamplingParams(
        max_tokens=5, temperature=0.0, stop=("\n",)
    )
    hot = _sampling_params({"until": "Q:", "do_sample": True, "temperature": 0.6, "top_p": 0.9})
    assert (hot.temperature, hot.top_p, hot.stop, hot.max_tokens) == (0.6, 0.9, ("Q:",), 256)
    assert _sampling_params({"temperature": 0.6}).temperature == 0.0  # not asked to sample
    with pytest.raises(ConfigError, match="a task sets num_beams for its answers"):
        _sampling_params({"num_beams": 4})
