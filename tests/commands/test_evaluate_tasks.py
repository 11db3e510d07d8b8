"""`pretrain evaluate --tasks`: small local tasks, compared with transformers' answers."""

import importlib.util
import json
import sys

import pytest

from tests.engine.evaluation.conftest import CHECKPOINT, cache_datasets_in, write_tasks

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)
quietly = pytest.mark.filterwarnings("ignore")  # from the harness's imports


@pytest.fixture
def tasks(trained, monkeypatch):
    """Three local tasks: multiple choice, likelihood of texts, generated answers."""
    cache_datasets_in(trained / "cache", monkeypatch)
    return write_tasks(trained / "tasks")


@needs_harness
@quietly
def test_json_has_the_checkpoint_and_every_score(pretrain, tasks):
    outcome = pretrain(f"evaluate --tasks bottles --include-path {tasks} --dtype float32 --json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["checkpoint"] == str(CHECKPOINT)
    assert result.keys() == {"checkpoint", "seq_len", "dtype", "quantize", "scores", "harness"}
    assert [score["measure"] for score in result["scores"]] == ["acc", "acc_norm"]
    keys = {"task", "measure", "filter", "value", "stderr", "questions", "shots"}
    assert all(score.keys() == keys for score in result["scores"])


@needs_harness
@quietly
def test_limit_caps_the_questions_shown_in_the_table(pretrain, tasks):
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
def test_invalid_task_options_are_refused(refused, tasks, options, said):
    (tasks / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: lost.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: x\nmetric_list: [{metric: bits_per_byte}]\n"
    )
    assert said in refused(f"evaluate {options}")


@pytest.mark.usefixtures("trained")
def test_a_missing_harness_error_names_the_package_to_install(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'pretrain[eval]'" in refused("evaluate --tasks hellaswag")
