"""Process-wide settings: the environment before torch is loaded, and `--set`."""

import os
import subprocess
import sys

import pytest

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.runtime import process_settings
from pretrain_cli.errors import ConfigError

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
