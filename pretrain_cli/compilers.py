"""Compilers that torch.compile and our own kernels need, and what they can't compile."""

import importlib
import os
import shutil

from pretrain_cli.errors import ConfigError


def no_triton() -> str:
    """Return the reason why Triton can't compile for a GPU here; empty if it can."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return "Triton is not installed"
    # As Triton looks for it: CC replaces the others, even if it names nothing.
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(shutil.which(name) for name in compilers):
        return f"Triton needs a C compiler, and finds no {' or '.join(compilers)}"
    return ""


def no_cpp() -> str:
    """Return the reason why torch.compile can't compile for a CPU here; empty if it can."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    if any(name and shutil.which(name) for name in compilers):
        return ""
    return "no C++ compiler is installed (g++ or clang++)"


def uncompiled_experts(experts: int, dtype: str, asked: bool | str = "auto") -> str:
    """Return the reason why a model with these experts can't be compiled in this dtype; empty if it
    can. Raises ConfigError with it if `asked` is true."""
    if not experts or dtype != "float32":
        return ""
    reason = "PyTorch doesn't compile products of experts in float32"
    if asked is True:
        raise ConfigError(f"speed.compile: true can't be used: {reason}; use bfloat16, or false")
    return reason
