"""Settings of the whole process, most of them made before torch is loaded or at once after.

passive_threads     OpenMP threads that wait for each other spin briefly and then sleep. Spinning on
                    and on is slower where anything else wants a core; sleeping at once
                    (OMP_WAIT_POLICY=PASSIVE, tried and left) is slower where nothing does, most of
                    all for a small model. Read when torch is loaded.
keep_freed_memory   glibc keeps freed memory for the next step instead of giving it back to the
                    kernel and faulting it in again, page by page: a vocabulary's gradients are
                    hundreds of megabytes.

Tried and removed: transparent huge pages for large buffers. Training was no faster and took 7 %
more memory (0.72 × alone, where freed memory comes back as zeros); sampling gained 1.01 to 1.03 ×,
within its spread.

Tokenizing wants the opposite, `give_back_memory`: blocks of many sizes come and go there, and kept
they leave ever more gaps.

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

PROCESS_SETTINGS = (
    "float32_matmul",
    "onednn_matmul",
    "passive_threads",
    "keep_freed_memory",
    "cudnn_benchmark",
    "expandable_segments",
    "deterministic",
)
"""Speed settings that hold for the whole process, whatever it computes."""
LATE = "torch was loaded before it could be set"
SPINS, BRIEF = "GOMP_SPINCOUNT", "1000"
POLICY = "OMP_WAIT_POLICY"
KINETO_LEVEL = "KINETO_LOG_LEVEL"


_LOADED = time.monotonic()


def process_age() -> float:
    """Seconds since this process began; where the system has no /proc, since it loaded this."""
    try:
        began = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return time.monotonic() - _LOADED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(began) / os.sysconf("SC_CLK_TCK")


def set_env_before_torch(asked: SpeedConfig) -> None:
    """Set the environment variables that torch reads when it is loaded.

    Does nothing if torch is loaded already, and keeps variables that are set."""
    if "torch" in sys.modules:
        return
    if asked.passive_threads is not False and POLICY not in os.environ:
        os.environ.setdefault(SPINS, BRIEF)


def silence_kineto() -> None:
    """Have Kineto, which torch profiles with, say nothing, unless the environment says what it
    does: what it says of every profile (USDT) has a higher level than its errors. Before torch is
    loaded; processes that are started from this one have it too."""
    os.environ.setdefault(KINETO_LEVEL, "6")


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
    return in_force, LATE


def keep_freed_memory(asked: bool | str, device_type: str) -> tuple[bool, str]:
    """(whether freed memory is kept, why where that is not what was asked)."""
    if asked is False:
        return False, ""
    if device_type != "cpu":
        return False, "a setting of the CPU's memory"
    if platform.libc_ver()[0] != "glibc":
        return False, "this system's malloc is not glibc's"
    return True, "" if asked is True else "no memory is faulted in again at each step"


def check_process_settings(option: str, assignments: Iterable[str]) -> None:
    """Refuse what is not `speed.NAME=VALUE` of a setting of the whole process."""
    known = [f"speed.{name}" for name in PROCESS_SETTINGS]
    for assignment in assignments:
        name, equals, _ = assignment.partition("=")
        if not equals or name not in known:
            raise ConfigError(
                f"{option} {assignment}: not NAME=VALUE of one of {', '.join(known)}"
                + did_you_mean(name, known)
            )


def set_compile_cache(folder: Path) -> None:
    """Have torch.compile keep what it makes in this folder, and look there first, unless the
    environment names another. Before anything is compiled."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.absolute()))
