"""Process-wide settings, most of them set before torch is loaded or right after.

passive_threads     Waiting OpenMP threads spin briefly and then sleep. Endless spinning is slower
                    if another program needs a core. Sleeping at once (OMP_WAIT_POLICY=PASSIVE,
                    tried and rejected) is slower if none does, most of all for a small model.
                    OpenMP reads the setting when torch is loaded.
keep_freed_memory   glibc keeps freed memory for the next step. Otherwise it returns the memory to
                    the kernel, which faults it in again page by page; the gradients of a large
                    vocabulary are hundreds of megabytes.

Tried and removed: transparent huge pages for large buffers. Training was no faster and took 7 %
more memory (0.72 × the speed with huge pages alone, without keep_freed_memory, because the kernel
zeroes returned memory); sampling gained 1.01 to 1.03 ×, within its spread.

Tokenizing needs the opposite, `host_memory.give_back_memory`: it allocates and frees blocks of many
sizes, which would fragment the heap if they were kept.

This module imports no torch, so that a command can call `set_env_before_torch` first.
"""

import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.errors import ConfigError, did_you_mean

PROCESS_SETTINGS = SpeedConfig.names("is_process_wide")
LATE = "torch was loaded before it could be set"
SPINS, BRIEF = "GOMP_SPINCOUNT", "1000"
POLICY = "OMP_WAIT_POLICY"
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Configuration of the CUDA allocator. torch reads the first that is set."""
KINETO_LEVEL = "KINETO_LOG_LEVEL"
COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_compile_cache: str | None = None
"""Folder that `set_compile_cache` has set; None if it has not."""


_LOADED = time.monotonic()


def process_age() -> float:
    """Return the seconds since this process began; without /proc, since this module was loaded."""
    try:
        began = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return time.monotonic() - _LOADED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(began) / os.sysconf("SC_CLK_TCK")


def set_env_before_torch(asked: SpeedConfig) -> None:
    """Set the environment variables that torch reads when it is loaded.

    Does nothing if torch is already loaded. Variables that are already set stay as they are.
    """
    if "torch" in sys.modules:
        return
    if asked.passive_threads is not False and POLICY not in os.environ:
        os.environ.setdefault(SPINS, BRIEF)


def silence_kineto() -> None:
    """Silence Kineto, which torch's profiler uses, unless the environment sets its log level.

    Level 6 also hides its errors, because its message on every profile (USDT) has a higher level.
    Call it before torch is loaded. Child processes inherit the setting.
    """
    os.environ.setdefault(KINETO_LEVEL, "6")


def passive_threads(asked: bool | str) -> tuple[bool, str]:
    """Return (True if waiting threads soon sleep, reason; empty if as asked)."""
    policy = os.environ.get(POLICY, "")
    in_force = policy.upper() == "PASSIVE" or (not policy and SPINS in os.environ)
    if asked == in_force:
        return in_force, ""
    if asked == "auto" and in_force:
        return in_force, "other programs may want a core"
    if policy or SPINS in os.environ:
        return in_force, f"{POLICY} or {SPINS} is set in the environment"
    return in_force, LATE


def keep_freed_memory(asked: bool | str, device_type: str) -> tuple[bool, str]:
    """Return (True if freed memory is kept, reason; empty if as asked)."""
    if asked is False:
        return False, ""
    if device_type != "cpu":
        return False, "a setting of the CPU's memory"
    if platform.libc_ver()[0] != "glibc":
        return False, "this system's malloc is not glibc's"
    return True, "" if asked is True else "no memory is faulted in again at each step"


def expandable_segments(asked: bool | str, device_type: str) -> tuple[bool, str]:
    """Return (True if the CUDA allocator's segments grow, reason; empty if as asked)."""
    if device_type != "cuda":
        return False, "a setting of the CUDA allocator" if asked else ""
    if variable := allocator_variable():
        in_force = "expandable_segments:True" in os.environ[variable].replace(" ", "")
        return in_force, "" if asked == in_force else f"{variable} is set in the environment"
    if asked == "auto":
        return True, "less GPU memory lost to fragments"
    return bool(asked), ""


def allocator_variable() -> str:
    """Return the environment variable that configures the CUDA allocator; empty if none is set."""
    return next((name for name in ALLOCATOR_VARIABLES if os.environ.get(name)), "")


def check_process_settings(option: str, assignments: Iterable[str]) -> None:
    """Raise ConfigError unless each assignment is `speed.NAME=VALUE` of PROCESS_SETTINGS."""
    known = [f"speed.{name}" for name in PROCESS_SETTINGS]
    for assignment in assignments:
        name, equals, _ = assignment.partition("=")
        if not equals or name not in known:
            raise ConfigError(
                f"{option} {assignment}: not NAME=VALUE of one of {', '.join(known)}"
                + did_you_mean(name, known)
            )


def set_compile_cache(folder: Path) -> None:
    """Make torch.compile cache its kernels in this folder, unless the environment sets another.

    Call it before anything is compiled. A later call in the same process replaces the folder.
    """
    global _compile_cache
    if os.environ.get(COMPILE_CACHE) in (None, _compile_cache):
        _compile_cache = os.environ[COMPILE_CACHE] = str(folder.absolute())
