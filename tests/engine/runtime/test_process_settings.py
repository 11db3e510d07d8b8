"""What this process may take of the machine."""

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
    for name in (process_settings.HUGE_PAGES, process_settings.SPINS, process_settings.POLICY):
        monkeypatch.setenv(name, "")  # so that it is undone
        monkeypatch.delenv(name)


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Says to whom the system gives huge pages."""

    def give(to):
        choices = ("always", "madvise", "never")
        words = (f"[{word}]" if word == to else word for word in choices)
        (tmp_path / "enabled").write_text(" ".join(words) + "\n")
        monkeypatch.setattr(process_settings, "GIVEN", tmp_path / "enabled")

    return give


@pytest.mark.parametrize(
    ("asked", "writing", "taken"),
    [("auto", True, "1"), ("auto", False, None), (True, False, "1"), (False, True, None)],
)
def test_huge_pages_are_asked_for_to_write_text_or_where_they_are_wanted(
    no_torch, given, asked, writing, taken
):
    given("madvise")
    process_settings.set_env_before_torch(SpeedConfig(huge_pages=asked), writing=writing)
    assert os.environ.get(process_settings.HUGE_PAGES) == taken
    in_force, reason = process_settings.huge_pages(asked, "cpu", writing=writing)
    assert in_force is (taken == "1")
    assert bool(reason) is (asked == "auto")


def test_what_the_environment_says_of_huge_pages_holds(no_torch, given, monkeypatch):
    given("madvise")
    monkeypatch.setenv(process_settings.HUGE_PAGES, "0")
    process_settings.set_env_before_torch(SpeedConfig(), writing=True)
    assert os.environ[process_settings.HUGE_PAGES] == "0"
    in_force, reason = process_settings.huge_pages("auto", "cpu", writing=True)
    assert (in_force, reason) == (False, "THP_MEM_ALLOC_ENABLE is set in the environment")
    monkeypatch.setenv(process_settings.HUGE_PAGES, "1")
    assert process_settings.huge_pages(False, "cpu", writing=False)[0] is True


def test_nothing_is_set_for_a_torch_that_is_there(given, monkeypatch):
    given("madvise")
    monkeypatch.setenv(process_settings.HUGE_PAGES, "")
    monkeypatch.delenv(process_settings.HUGE_PAGES)
    process_settings.set_env_before_torch(SpeedConfig(), writing=True)
    assert process_settings.HUGE_PAGES not in os.environ
    assert process_settings.huge_pages(True, "cpu", writing=False) == (False, process_settings.LATE)


def test_whether_there_are_huge_pages_is_the_systems_to_say(given, monkeypatch, tmp_path):
    monkeypatch.setenv(process_settings.HUGE_PAGES, "1")
    given("never")
    assert process_settings.huge_pages(True, "cpu", writing=True) == (
        False,
        "this system gives none",
    )
    given("always")
    assert process_settings.huge_pages(False, "cpu", writing=True)[0] is True
    monkeypatch.setattr(process_settings, "GIVEN", tmp_path / "not there")
    assert process_settings.huge_pages("auto", "cpu", writing=True) == (
        False,
        "this system gives none",
    )
    assert process_settings.huge_pages(True, "cuda", writing=True)[0] is False


PAGES = """
import os, sys
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.runtime.process_settings import before_torch

before_torch(SpeedConfig(huge_pages={asked}))
import torch

buffer = torch.ones(2**24)
lines = open("/proc/self/smaps").read().split("kB\\n")
print(sum(int(line.split()[-1]) for line in lines if line.startswith("AnonHugePages")))
"""


@pytest.mark.skipif(
    process_settings._huge_pages_given() != "madvise", reason="huge pages are not to be had"
)
def test_large_buffers_are_in_huge_pages():
    """64 MB of them."""

    def huge(asked):
        clean = {k: v for k, v in os.environ.items() if k != process_settings.HUGE_PAGES}
        out = subprocess.run(
            [sys.executable, "-c", PAGES.format(asked=asked)],
            capture_output=True, check=True, env=clean,
        )  # fmt: skip
        return int(out.stdout)

    assert huge(False) < 2**14
    assert huge(True) > 2**14


PROFILED = """
from pretrain_cli.engine.runtime.process_settings import hush_profiler

{hush}
import torch

with torch.profiler.profile(acc_events=True):
    torch.ones(3) + 1
"""


def test_a_profile_says_nothing_on_standard_error():
    clean = {k: v for k, v in os.environ.items() if k != process_settings.KINETO_LEVEL}
    done = subprocess.run(
        [sys.executable, "-c", PROFILED.format(hush="hush_profiler()")],
        capture_output=True, check=True, env=clean, text=True,
    )  # fmt: skip
    assert done.stderr == ""


def test_what_the_environment_says_of_the_profiler_holds(monkeypatch):
    monkeypatch.setenv(process_settings.KINETO_LEVEL, "1")
    process_settings.silence_kineto()
    assert os.environ[process_settings.KINETO_LEVEL] == "1"


def test_only_settings_of_the_process_are_taken():
    process_settings.check_process_settings(
        "--set", ["speed.huge_pages=false", "speed.passive_threads=no"]
    )
    for wrong in ("speed.compile=true", "huge_pages=true", "speed.huge_pages", "train.steps=3"):
        with pytest.raises(ConfigError, match=f"^--set {wrong}: not NAME=VALUE of one of speed.fl"):
            process_settings.check_process_settings("--set", [wrong])
