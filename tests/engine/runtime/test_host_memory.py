"""Host memory: available bytes by kernel and control groups, and freed memory kept by glibc."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain_cli.engine.runtime import host_memory


def limit(group: Path, **numbers: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in numbers.items():
        (group / name.replace("_", ".")).write_text(text + "\n")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Return the root folder of fake control groups; this process belongs to /job/step."""
    real = Path.read_text

    def read(path, *arguments, **options):
        if path == Path("/proc/self/cgroup"):
            return "1:name=systemd:/\n0::/job/step\n"
        if path == Path("/proc/meminfo"):
            return "MemTotal:       2000 kB\nMemAvailable:    1000 kB\n"
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    return tmp_path


def test_available_memory_is_the_kernels_estimate(groups):
    assert host_memory.available_memory() == 1000 * 1024
    limit(groups / "job/step", memory_max="max", memory_current="5", memory_stat="anon 5")
    assert host_memory.available_memory() == 1000 * 1024


def test_limits_of_a_control_group_and_its_parents_apply(groups):
    limit(groups / "job/step", memory_max="9000", memory_current="5000",
          memory_stat="anon 4000\ninactive_file 600\nactive_file 400")  # fmt: skip
    assert host_memory.available_memory() == 9000 - 5000 + 600
    limit(groups / "job", memory_max="8000", memory_current="6000", memory_stat="anon 6000")
    assert host_memory.available_memory() == 2000


def test_available_memory_is_none_if_the_system_reports_nothing(monkeypatch):
    def missing(path, *arguments, **options):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert host_memory.available_memory() is None


GAPS = """
from pretrain_cli.engine.runtime.host_memory import give_back_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

if {give_back}:
    give_back_memory()
bytes(2**24)  # after which glibc by itself keeps blocks up to this size
before = resident()
blocks = [bytearray(2**22) for _ in range(7)]
del blocks
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_freed_memory_is_returned_to_the_system():
    def left(give_back):
        script = GAPS.format(give_back=give_back)
        out = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        return float(out.stdout)

    assert left(give_back=False) > 15
    assert left(give_back=True) < 5
