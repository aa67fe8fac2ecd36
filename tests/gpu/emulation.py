"""Kernels' own CUDA source, compiled for the CPU with the headers of ``emulator/`` in the place of CUDA's."""

import ctypes
import os
import subprocess
from pathlib import Path

EMULATOR = Path(__file__).resolve().parent / "emulator"
CSRC = EMULATOR.parents[2] / "csrc"
GUARD = 256  # bytes after a workspace that nobody may touch


def library(name, folder):
    """``emulator/emulated_<name>.cpp``, compiled into a folder and loaded."""
    path = folder / f"{name}.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-DPYATTR_WITH_CUDA", "-shared", "-fPIC", f"-I{EMULATOR}", f"-I{CSRC}"]
    source = EMULATOR / f"emulated_{name}.cpp"
    subprocess.run([os.environ.get("CXX", "c++"), *flags, str(source), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def extent(array):
    """Bytes from a tensor's first element to the end of its last."""
    elements = sum((n - 1) * stride for n, stride in zip(array.shape, array.stride(), strict=True)) + 1
    return elements * array.element_size()
