"""Settings of the whole process, most of them made before torch is loaded or at once after.

passive_threads     OpenMP threads that wait for each other spin briefly and then sleep. Spinning on
                    and on is slower where anything else wants a core; sleeping at once
                    (OMP_WAIT_POLICY=PASSIVE, tried and left) is slower where nothing does, most of
                    all for a small model. Read when torch is loaded.
keep_freed_memory   glibc keeps freed memory for the next step instead of giving it back to the
                    kernel and faulting it in again, page by page: a vocabulary's gradients are
                    hundreds of megabytes.
huge pages          Large buffers in pages of 2 MB, where the kernel gives them to whoever asks: a
                    token reads every weight once, and by 4 KB at a time waits for addresses too.
                    Taken to write text; training was not measured with it. Read by torch at its
                    first large buffer.

Tokenizing wants the opposite, `give_back_memory`: blocks of many sizes come and go there, and kept
they leave ever more gaps.

This module imports no torch, so that a command can call `wait_passively` first.
"""

import ctypes
import math
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

SPINS, BRIEF = "GOMP_SPINCOUNT", "1000"
POLICY = "OMP_WAIT_POLICY"
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
CGROUPS = Path("/sys/fs/cgroup")
# mallopt's numbers, in glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4


_LOADED = time.monotonic()


def age() -> float:
    """Seconds since this process began; where the system has no /proc, since it loaded this."""
    try:
        began = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return time.monotonic() - _LOADED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(began) / os.sysconf("SC_CLK_TCK")


def available_memory() -> int | None:
    """Bytes that this process can still take, by the kernel and by its control groups; None where
    the system doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for line in groups:
        if line.startswith("0::/"):  # version 2; a limit on any group above holds, too
            group = CGROUPS / line[4:]
            free += [_left_of(each) for each in (group, *group.parents) if each.is_dir()]
    return int(min(free)) if free else None


def _left_of(group: Path) -> float:
    """Of a control group's limit; cached files count as free, as they make way."""
    try:
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
    except OSError:
        return math.inf
    if limit.strip() == "max":
        return math.inf
    return int(limit) - int(used) + int(cached[1] if cached else 0)


def wait_passively(asked: bool | str) -> None:
    """Have OpenMP's threads spin but briefly, unless the environment says how they wait or torch is
    loaded already."""
    if asked is not False and "torch" not in sys.modules and POLICY not in os.environ:
        os.environ.setdefault(SPINS, BRIEF)


def take_huge_pages() -> None:
    """Have torch ask for huge pages, unless the environment says whether."""
    os.environ.setdefault(HUGE_PAGES, "1")


def passive_threads(asked: bool | str) -> tuple[bool, str]:
    """(whether waiting threads sleep soon, why where that is not what was asked)."""
    policy = os.environ.get(POLICY, "")
    in_force = policy.upper() == "PASSIVE" or (not policy and SPINS in os.environ)
    if asked == in_force:
        return in_force, ""
    if asked == "auto" and in_force:
        return in_force, "other programs may want a core"
    if policy or SPINS in os.environ:
        return in_force, f"{POLICY} or {SPINS} is set in the environment"
    return in_force, "torch was loaded before it could be set"


def keep_freed_memory(asked: bool | str, device_type: str) -> tuple[bool, str]:
    """(whether freed memory is kept, why where that is not what was asked)."""
    if asked is False:
        return False, ""
    if device_type != "cpu":
        return False, "a setting of the CPU's memory"
    if platform.libc_ver()[0] != "glibc":
        return False, "this system's malloc is not glibc's"
    return True, "" if asked is True else "no memory is faulted in again at each step"


def keep_compiled(folder: Path) -> None:
    """Have torch.compile keep what it makes in this folder, and look there first, unless the
    environment names another. Before anything is compiled."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.absolute()))


def apply_memory(keep: bool) -> None:
    """Have glibc keep what is freed. It holds for the rest of the process."""
    if keep:
        libc: Any = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 64 * 2**20)


def give_back_memory() -> None:
    """Have glibc give back what is freed, rather than find out what size of it to keep. It holds
    for the rest of the process, and for those that are forked from it."""
    if platform.libc_ver()[0] == "glibc":
        libc: Any = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**18)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**20)
