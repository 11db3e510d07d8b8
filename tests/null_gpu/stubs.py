"""Write the functions that runtime.c and driver.c leave out: each succeeds and does nothing.

    stubs.py SITE_PACKAGES CUDA_HEADER RUNTIME_OBJECT DRIVER_OBJECT

writes runtime_stubs.c and driver_stubs.c to the current folder.
"""

import re
import subprocess
import sys
from pathlib import Path

RUNTIME = re.compile(r"(?:__cuda|cuda[A-Z]|cublas)\w+")
PLAIN = 'int {0}(void) {{ null_gpu_count("{0}"); return 0; }}'
SILENT = "int {0}(void) {{ return 0; }}"
JUMP = '__asm__(".globl {0}\\n.type {0},@function\\n{0}: jmp {1}@PLT");'


def symbols(library: Path, which: str) -> set[str]:
    """Return the names that a library or an object file defines or leaves undefined."""
    command = ["nm", which, *(["-D"] if library.suffix == ".so" else []), str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


def main(site: Path, header: Path, runtime: Path, driver: Path) -> None:
    # PyTorch's libraries name the functions of the runtime and of cuBLAS that they call.
    called = set[str]()
    for library in (site / "torch/lib").glob("*.so"):
        called |= {s for s in symbols(library, "--undefined-only") if RUNTIME.fullmatch(s)}
    missing = sorted(called - symbols(runtime, "--defined-only"))
    head = "void null_gpu_count(const char *name);\n"
    Path("runtime_stubs.c").write_text(head + "\n".join(PLAIN.format(s) for s in missing) + "\n")

    # The driver's are looked up by name while a program runs: all that its header declares.
    text = header.read_text()
    declared = set(re.findall(r"\bCUDAAPI (cu[A-Z]\w+)\(", text))
    declared |= set(re.findall(r"\b(cu[A-Z]\w+_v\d)\b", text))
    strings = (site / "torch/lib/libc10_cuda.so").read_bytes()
    declared |= {s.decode() for s in re.findall(rb"\0(nvml[A-Z]\w+)(?=\0)", strings)}
    defined = symbols(driver, "--defined-only")
    lines: list[str] = []
    for name in sorted(declared - defined):
        base = re.sub(r"_v\d$", "", name)
        lines.append(JUMP.format(name, base) if base in defined else SILENT.format(name))
    Path("driver_stubs.c").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
