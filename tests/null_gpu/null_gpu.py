"""Counters of the null GPU (see build): launches, copies, waits and compiled kernels of a block.

with watch() as seen:
    train_step(...)
assert not seen.waits, seen.report()
"""

import contextlib
import ctypes
import os
import re
import subprocess
import tempfile
import traceback
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LOADED = "NULL_GPU" in os.environ
"""True if this process runs on the null GPU: DEST/run sets the variable to its folder."""
TEXT_BYTES = 1 << 16
SOURCE_FRAMES = 4
"""Frames of this project that a report shows for a wait, the innermost last."""


@dataclass(frozen=True)
class Wait:
    """A call that keeps the CPU waiting: a synchronization, or a copy of memory not pinned."""

    name: str
    bytes: int
    """Bytes of a copy; 0 for a synchronization."""
    source: str
    """Lines of the project that led to it, the innermost last; empty in a thread of PyTorch's."""


@dataclass
class Seen:
    """Counts and waits of a block that `watch` observed."""

    counts: Counter[str] = field(default_factory=Counter)
    waits: list[Wait] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """Work given to the device: kernels, matrix products, copies on it, and fills."""
        return sum(count for name, count in self.counts.items() if _is_launch(name))

    def report(self) -> str:
        """Return the waits as text: each name and source once, with the number of times."""
        times = Counter((wait.name, wait.source) for wait in self.waits)
        return "\n".join(
            f"{count} × {name} from\n{source or '  a thread of PyTorch'}"
            for (name, source), count in times.items()
        )


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel, compiled for the device."""

    name: str
    shared: int
    """Bytes of shared memory of a block."""
    registers: int
    """Registers of a thread."""
    stack: int
    """Bytes of local memory of a thread: mostly registers that were spilled."""


def counts() -> Counter[str]:
    """Return how often each function was called since the last reset, by name."""
    text = ctypes.create_string_buffer(TEXT_BYTES)
    _library().null_gpu_counts(text, TEXT_BYTES)
    lines = (line.split(" ", 1) for line in text.value.decode().splitlines())
    return Counter({name: int(count) for count, name in lines})


def reset() -> None:
    """Set every counter to 0."""
    _library().null_gpu_reset()


@contextlib.contextmanager
def watch() -> Generator[Seen]:
    """Count what the block does, and note where each wait comes from. Blocks don't nest."""
    seen = Seen()
    reset()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)
        seen.counts = counts()


@contextlib.contextmanager
def compiled_kernels() -> Generator[list[Kernel]]:
    """Collect the Triton kernels that the block compiles: all of a step only with empty caches."""
    from triton.compiler import compiler

    kernels: list[Kernel] = []
    original = compiler.CompiledKernel.__init__

    def initialize(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        registers, stack = _resources(self.asm["cubin"])
        kernels.append(Kernel(self.metadata.name, self.metadata.shared, registers, stack))

    compiler.CompiledKernel.__init__ = initialize
    try:
        yield kernels
    finally:
        compiler.CompiledKernel.__init__ = original


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack of a thread. Triton's wheel has cuobjdump."""
    from triton.backends import nvidia

    program = Path(nvidia.__path__[0]) / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [program, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def _is_launch(name: str) -> bool:
    if name.startswith("cublas"):
        return bool(re.search(r"gemm|gemv|matmul$", name, re.IGNORECASE))
    return name.startswith("launch ") or name in ("copy on device", "memset")


# --- the hook ------------------------------------------------------------------------------------

_watching: list[Seen] = []


def _library() -> Any:
    return ctypes.CDLL(os.environ["NULL_GPU"] + "/libnull_gpu.so")


def _on_wait(name: bytes, size: int) -> None:
    if _watching:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT))]
        frames = [f for f in frames if Path(f.filename) != Path(__file__)][-SOURCE_FRAMES:]
        source = "\n".join(
            f"  {Path(f.filename).relative_to(ROOT)}:{f.lineno} {f.line}" for f in frames
        )
        _watching[-1].waits.append(Wait(name.decode(), size, source))


_callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_long)(_on_wait)
if LOADED:
    _library().null_gpu_on_wait(_callback)
