"""Compilers that torch.compile and our own kernels need."""

import importlib
import os
import shutil


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
