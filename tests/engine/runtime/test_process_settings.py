"""Settings of the process, and the memory it may take."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.runtime import process_settings
from pretrain_cli.errors import ConfigError


def limit(group: Path, **numbers: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in numbers.items():
        (group / name.replace("_", ".")).write_text(text + "\n")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups of the test's own, in one of which this process is."""
    real = Path.read_text

    def read(path, *arguments, **options):
        if path == Path("/proc/self/cgroup"):
            return "1:name=systemd:/\n0::/job/step\n"
        if path == Path("/proc/meminfo"):
            return "MemTotal:       2000 kB\nMemAvailable:    1000 kB\n"
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(process_settings, "CGROUPS", tmp_path)
    return tmp_path


def test_available_memory_is_what_the_kernel_says(groups):
    assert process_settings.available_memory() == 1000 * 1024
    limit(groups / "job/step", memory_max="max", memory_current="5", memory_stat="anon 5")
    assert process_settings.available_memory() == 1000 * 1024


def test_a_control_group_or_one_above_it_leaves_less(groups):
    limit(groups / "job/step", memory_max="9000", memory_current="5000",
          memory_stat="anon 4000\ninactive_file 600\nactive_file 400")  # fmt: skip
    assert process_settings.available_memory() == 9000 - 5000 + 600
    limit(groups / "job", memory_max="8000", memory_current="6000", memory_stat="anon 6000")
    assert process_settings.available_memory() == 2000


def test_a_system_that_says_nothing_has_no_answer(monkeypatch):
    def missing(path, *arguments, **options):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert process_settings.available_memory() is None


GAPS = """
from pretrain_cli.engine.runtime.process_settings import give_back_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

if {give_back}:
    give_back_memory()
bytes(2**24)  # after which glibc by itself keeps blocks up to this size
before = resident()
blocks = [bytearray(2**20) for _ in range(20)]
del blocks
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_memory_that_is_freed_is_given_back():
    def left(give_back):
        script = GAPS.format(give_back=give_back)
        out = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        return float(out.stdout)

    assert left(give_back=False) > 15
    assert left(give_back=True) < 5


# --- before torch is loaded ----------------------------------------------------------------------


@pytest.fixture
def no_torch(monkeypatch):
    """As before torch is loaded, in an environment that says nothing."""
    monkeypatch.delitem(sys.modules, "torch")
    for name in (process_settings.SPINS, process_settings.POLICY):
        monkeypatch.setenv(name, "")  # so that it is undone
        monkeypatch.delenv(name)


def test_nothing_is_set_once_torch_is_loaded(monkeypatch):
    for name in (process_settings.SPINS, process_settings.POLICY):
        monkeypatch.setenv(name, "")  # so that it is undone
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


def test_a_profile_says_nothing_on_standard_error():
    clean = {k: v for k, v in os.environ.items() if k != process_settings.KINETO_LEVEL}
    done = subprocess.run(
        [sys.executable, "-c", PROFILED.format(hush="silence_kineto()")],
        capture_output=True, check=True, env=clean, text=True,
    )  # fmt: skip
    assert done.stderr == ""


def test_what_the_environment_says_of_the_profiler_holds(monkeypatch):
    monkeypatch.setenv(process_settings.KINETO_LEVEL, "1")
    process_settings.silence_kineto()
    assert os.environ[process_settings.KINETO_LEVEL] == "1"


def test_only_settings_of_the_process_are_taken():
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
