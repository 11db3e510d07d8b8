"""`--check-resume`: it passes for equal runs, and names the first difference otherwise."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.engine.training.check_resume import check_resume, compare
from pretrain_cli.errors import ConfigError


@pytest.fixture
def pair(settings, run, tmp_path):
    """Return a run and its copy."""
    run(settings("one", train__steps=2))
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    return tmp_path / "one", tmp_path / "other"


def test_a_run_is_equal_to_its_copy(pair):
    found = compare(*pair)
    assert found.difference == ""
    assert found.numbers == 2 * 4 + 2  # four a step, and an evaluation's loss and tokens
    weights = load_file(pair[0] / "checkpoints/step-000002/model.safetensors")
    assert found.tensors > 3 * len(weights)  # weights, and two moments each


@pytest.mark.parametrize(
    ("name", "said"),
    [("model", "weights model.norm.weight[5]: "),
     ("training/optimizer", "optimizer exp_avg.model.norm.weight[5]: ")],
)  # fmt: skip
def test_a_difference_of_one_bit_is_found_and_named(pair, name, said):
    path = pair[1] / f"checkpoints/step-000002/{name}.safetensors"
    tensors = load_file(path)
    key = said.split()[1].partition("[")[0]
    before = tensors[key][5].item()
    tensors[key].view(torch.int32)[5] ^= 1
    save_file(tensors, path)
    after = tensors[key][5].item()
    assert compare(*pair).difference == f"{said}{before!r} straight, {after!r} resumed"


def test_a_different_loss_is_reported_first(pair):
    path = pair[1] / "metrics.jsonl"
    lines = path.read_text().splitlines()
    [number] = [i for i, line in enumerate(lines) if json.loads(line).items() >= {"kind": "step",
                "step": 2}.items()]  # fmt: skip
    row = json.loads(lines[number])
    lines[number] = json.dumps(row | {"loss": row["loss"] + 1e-6})
    path.write_text("\n".join(lines) + "\n")
    assert compare(*pair).difference.startswith(f"step 2, loss: {row['loss']!r} straight, step 2")


@pytest.mark.slow
def test_a_run_resumed_in_a_fresh_process_has_no_difference(settings, tmp_path):
    said = []
    config = settings(speed__deterministic=True)
    found = check_resume(config, 4, lambda event: said.append(event.text), StopRequest())
    assert found.difference == ""
    assert found.numbers == 4 * 4
    assert said == ["4 steps straight", "2 steps, saved", "Resumed to step 4"]
    assert list(tmp_path.iterdir()) == []


def test_fewer_than_two_steps_are_refused(settings):
    with pytest.raises(ConfigError, match="--check-resume: 1 is not at least 2 steps"):
        check_resume(settings(), 1, print, StopRequest())
