"""`pretrain train --lr-find`, run from the command line."""

from pathlib import Path

import pytest


@pytest.fixture
def dataset(pretrain, corpus):
    assert pretrain("tokenize --tokenizer bytes --val-fraction 0.1 corpus").code == 0


@pytest.mark.usefixtures("dataset")
def test_lr_find_suggests_a_rate_and_creates_no_run(pretrain, tiny):
    Path("settings.yaml").write_text("train: {tokens: 100000000}\noptimizer: {name: muon}\n")
    outcome = pretrain(f"train --config settings.yaml {tiny} --steps 12 --lr-find --out found")
    assert outcome.code == 0, outcome.err
    assert "step 12/12" in outcome.out or "step 11/12" in outcome.out
    assert "Suggested learning rate: " in outcome.out
    assert "lr-find.json" in outcome.out
    assert not Path("runs").exists()
    assert {path.name for path in Path("found").iterdir()} == {"lr-find.json", "lr-find.png"}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--learning-rate 0.1", "--learning-rate: 0.1 does not go with --lr-find"),
        ("--schedule wsd", "--schedule: wsd does not go with --lr-find"),
        ("--tokens 1000", "--tokens: 1000 does not go with --lr-find"),
        ("--resume runs/x", "--resume: runs/x does not go with --lr-find"),
    ],
)
def test_options_that_conflict_with_lr_find_are_refused(pretrain, option, said):
    outcome = pretrain(f"train --lr-find {option}")
    assert outcome.code == 2
    assert said in outcome.err
