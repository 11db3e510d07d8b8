"""Samples during a run: at their steps, once each, and without effect on training."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from pretrain_cli.config.build import build_config
from pretrain_cli.engine.runs.events import Sample, StepMetrics
from pretrain_cli.engine.runs.run_yaml import read_record, resumed_settings
from pretrain_cli.errors import ConfigError

SAMPLED = {"train__sample_every": 2, "train__sample_prompts": ["the cat", "a dog"]}
OFTEN = {"train__checkpoint_every": 3, "train__keep_checkpoints": 9}


def written(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def resume(run, folder):
    record = read_record(folder)
    return run(
        resumed_settings(record, build_config(record.settings, {}, [])), resume=(folder, record)
    )


def test_sampling_happens_at_its_steps_and_changes_no_loss(settings, run, tmp_path):
    plain = run(settings("plain", train__sample_tokens=0))
    sampled = run(settings("sampled", **SAMPLED))
    losses, expected = (
        [(event.loss, event.gradient_norm) for event in events if isinstance(event, StepMetrics)]
        for events in (sampled, plain)
    )
    assert losses == expected
    ours, theirs = (
        load_file(tmp_path / name / "checkpoints/step-000006/model.safetensors")
        for name in ("sampled", "plain")
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    rows = written(tmp_path / "sampled")
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (2, 4, 6) for prompt in ("the cat", "a dog")
    ]
    told = [event for event in sampled if isinstance(event, Sample)]
    assert [(event.step, event.text) for event in told] == [(r["step"], r["text"]) for r in rows]
    assert not (tmp_path / "plain/samples.jsonl").exists()


def test_samples_are_neither_repeated_nor_missing_after_a_kill(settings, run, tmp_path):
    """The run resumes from step 3; of the two samples of step 4, the second is cut short."""
    run(settings("straight", **SAMPLED, **OFTEN))
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/checkpoints/step-000006")
    path = tmp_path / "killed/samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]) + '{"step": 4, "pro')
    resume(run, tmp_path / "killed")
    assert written(tmp_path / "killed") == written(tmp_path / "straight")


@pytest.mark.parametrize("lost", [1, 2])
def test_samples_missing_after_a_kill_are_written_on_resume(settings, run, tmp_path, lost):
    """The run is killed at the end, between the last checkpoint and the last samples."""
    run(settings(**SAMPLED))
    before = written(tmp_path / "run")
    path = tmp_path / "run/samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-lost]))
    resume(run, tmp_path / "run")
    assert written(tmp_path / "run") == before


def test_one_prompt_may_be_a_string_instead_of_a_list(settings):
    assert settings(train__sample_prompts="a, b").train.sample_prompts == ("a, b",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__sample_prompts": []}, "sample_prompts: .* is not a text or a list of texts"),
        ({"train__sample_prompts": "a" * 3000}, "has 3,000 tokens, and the model 2,048 positions"),
        ({"train__sample_every": 5, "train__sample_tokens": 0}, "sample_every: 5 .*give it a len"),
    ],
)
def test_sample_settings_that_cannot_work_are_refused(settings, run, changes, said):
    with pytest.raises(ConfigError, match=said):
        run(settings(**changes))
