"""Triton kernels without a GPU: compiled for one, and run by Triton's interpreter in a child process.

Triton decides at import whether it interprets, so what a file tests under the interpreter runs in a pytest of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the child of test_under_the_interpreter")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="runs in the parent: an interpreter compiles nothing")


def run_interpreted(file):
    """A test file's tests under the interpreter."""
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env=os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr


def compile_for_gpu(kernel, types, constants, kept=None, capability=90, num_warps=4, **options):
    """The code of a kernel, compiled by the ptxas that comes with Triton; no device is touched.

    Args:
        kernel: a function of ``triton.jit``.
        types: of its arguments; "i32" where it says nothing.
        constants: the values of its ``constexpr`` arguments.
        kept: None, or the "i32" arguments that are never specialised: the others are compiled as sizes of 1, which
            Triton makes a constant.
        capability: 80 for an A100, 90 for an H100.
        num_warps, options: as of a launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    if kept is not None:
        ones = (name for name, kind in signature.items() if kind == "i32" and name not in (*kept, *constants))
        constants = {**constants, **dict.fromkeys(ones, 1)}
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "enable_fp_fusion": True, **options},
    )
    assert len(compiled.asm["cubin"]) > 0
    return compiled.asm
