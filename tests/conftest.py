"""Fixtures of all tests: no network, one thread, and command lines as a user types them.

Commands run in this process, through typer's runner, in an empty folder for each test.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads release their core
os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from typer.testing import CliRunner

from pretrain_cli.cli import app

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")

# A Gemma 3 with 30 thousand parameters and one layer of each kind.
TINY = (
    "--model gemma3-tiny --set model.layer_types=[sliding_attention,full_attention] "
    "--set model.hidden_size=32 --set model.intermediate_size=48 --set model.head_dim=16 "
    "--set model.query_pre_attn_scalar=16 --set model.sliding_window=8 "
    "--seq-len 32 --micro-batch-size 2 --dtype float32"
)
TRAINED_STEPS = 60
# In full, so that the text that the trained model samples does not change with the defaults.
TRAINED_WITH = (
    "--optimizer adamw --learning-rate 0.01 --schedule cosine --set model.initialization=normal "
    + " ".join(
        f"--set optimizer.{setting}"
        for setting in (
            "embedding_rate_scale=1.0",
            "betas=[0.9,0.95]",
            "eps=1e-8",
            "weight_decay=0.1",
            "embedding_decay_scale=1",
            "weight_decay_schedule=constant",
            "final_fraction=0.1",
        )
    )
)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a command: its exit code and its output."""

    code: int
    out: str
    err: str


def run(line: str, stdin: str | bytes = "") -> Outcome:
    """Run `pretrain LINE` in the current folder. Unexpected exceptions are not caught."""
    result = CliRunner().invoke(app, shlex.split(line), input=stdin, catch_exceptions=False)
    return Outcome(result.exit_code, result.stdout, result.stderr)


def write_corpus(folder: Path) -> None:
    """Write thirty short texts, 12 kB in total, two of them in a subfolder."""
    (folder / "more").mkdir(parents=True)
    for number in range(30):
        verse = (
            f"{number} green bottles hanging on the wall,\n"
            "And if one green bottle should accidentally fall,\n"
            f"There'll be {number - 1} green bottles hanging on the wall.\n"
        )
        place = folder / "more" if number > 27 else folder
        (place / f"verse-{number:02d}.txt").write_text(verse * 3)


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make this the current folder, and hide CUDA so that `auto` is the CPU on every machine."""
    patch.chdir(folder)
    patch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def pretrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Function that runs a command line; makes an empty folder the current one."""
    enter(tmp_path, monkeypatch)
    return run


@pytest.fixture
def corpus(pretrain: Callable[..., Outcome], tmp_path: Path) -> Path:
    """Path of a corpus of thirty short texts: `corpus/` in the current folder."""
    write_corpus(tmp_path / "corpus")
    return Path("corpus")


@pytest.fixture(scope="session")
def tiny() -> str:
    """Options for a model of 30 thousand parameters and steps of 128 tokens."""
    return f"{TINY} --tokens-per-step 128"


@pytest.fixture(scope="session")
def _trained(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        done = run("tokenize --tokenizer bytes --val-fraction 0.1 corpus")
        assert done.code == 0, done.err
        done = run(
            f"train {tiny} --steps {TRAINED_STEPS} {TRAINED_WITH} --out runs/tiny "
            "--set train.checkpoint_every=20 --set train.sample_tokens=16"
        )
        assert done.code == 0, done.err
    return folder


@pytest.fixture
def trained(_trained: Path, pretrain: Callable[..., Outcome], tmp_path: Path) -> Path:
    """Path of the current folder, with `corpus/`, `data/corpus/` and a run of 60 steps in
    `runs/tiny/`."""
    shutil.copytree(_trained, tmp_path, dirs_exist_ok=True)
    return tmp_path
