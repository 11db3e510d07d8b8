"""Process-wide settings: the environment before torch is loaded, and `--set`."""

import os
import subprocess
import sys

import pytest
import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.runtime import process_settings
from pretrain_cli.engine.runtime.speed import RULES, resolve_speed
from pretrain_cli.errors import ConfigError

CUDA = torch.device("cuda", 0)

# --- before torch is loaded ----------------------------------------------------------------------


@pytest.fixture
def no_torch(monkeypatch):
    """Pretend that torch is not loaded yet, and that the environment sets no thread policy."""
    monkeypatch.delitem(sys.modules, "torch")
    for name in (process_settings.SPINS, process_settings.POLICY):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)


def test_the_environment_is_unchanged_once_torch_is_loaded(monkeypatch):
    for name in (process_settings.SPINS, process_settings.POLICY):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    process_settings.set_env_before_torch(SpeedConfig())
    assert process_settings.SPINS not in os.environ
    assert process_settings.passive_threads(True) == (False, process_settings.LATE)


PROFILED = """
from pretrain_cli.engine.runtime.process_settings import silence_kineto

{hush}
import torch

with torch.profiler.profile(acc_events=True):
    torch.ones(3) + 1
"""


def test_a_profile_prints_nothing_to_standard_error():
    clean = {k: v for k, v in os.environ.items() if k != process_settings.KINETO_LEVEL}
    done = subprocess.run(
        [sys.executable, "-c", PROFILED.format(hush="silence_kineto()")],
        capture_output=True, check=True, env=clean, text=True,
    )  # fmt: skip
    assert done.stderr == ""


def test_kinetos_log_level_in_the_environment_is_kept(monkeypatch):
    monkeypatch.setenv(process_settings.KINETO_LEVEL, "1")
    process_settings.silence_kineto()
    assert os.environ[process_settings.KINETO_LEVEL] == "1"


def test_set_accepts_only_process_settings():
    process_settings.check_process_settings(
        "--set", ["speed.keep_freed_memory=false", "speed.passive_threads=no"]
    )
    for wrong in (
        "speed.compile=true",
        "passive_threads=true",
        "speed.passive_threads",
        "train.steps=3",
    ):
        with pytest.raises(ConfigError, match=f"^--set {wrong}: not NAME=VALUE of one of speed.fl"):
            process_settings.check_process_settings("--set", [wrong])


# --- the CUDA allocator --------------------------------------------------------------------------


@pytest.fixture
def allocator(monkeypatch):
    """Pretend that there is a GPU; return the configurations that its allocator gets."""
    for name in process_settings.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", given.append, raising=False)
    return given


def expandable_segments(asked):
    """Apply the setting as a run does, and return its decision."""
    asked = SpeedConfig(attention="sdpa", dtype="float32", expandable_segments=asked)
    decision = resolve_speed(asked, CUDA).decisions["expandable_segments"]
    RULES["expandable_segments"].apply(decision.in_force)
    return decision


@pytest.mark.parametrize(("asked", "in_force"), [("auto", True), (True, True), (False, False)])
def test_expandable_segments_configures_the_allocator(allocator, asked, in_force):
    assert expandable_segments(asked).in_force is in_force
    assert allocator == [f"expandable_segments:{in_force}"]  # and torch warns of nothing


def test_an_older_torch_gets_the_allocator_settings_it_knows(allocator, monkeypatch):
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", allocator.append)
    expandable_segments("auto")
    assert allocator == ["expandable_segments:True"]


@pytest.mark.parametrize("name", process_settings.ALLOCATOR_VARIABLES)
@pytest.mark.parametrize(
    ("value", "in_force"),
    [("expandable_segments:True", True), ("max_split_size_mb:64, expandable_segments : True", True),
     ("expandable_segments:False", False), ("max_split_size_mb:64", False)],
)  # fmt: skip
def test_an_allocator_variable_of_the_user_is_kept(allocator, monkeypatch, name, value, in_force):
    monkeypatch.setenv(name, value)
    for asked in ("auto", True, False):
        decision = expandable_segments(asked)
        assert decision.in_force is in_force
        assert decision.reason == ("" if asked == in_force else f"{name} is set in the environment")
    assert allocator == []
