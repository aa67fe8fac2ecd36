"""Every SIMD level of the CPU kernels in a process of its own, since the level is chosen once: right, and the same bits."""

import os
import subprocess
import sys

import pytest

from pyattr import backends

LEVELS = [] if isinstance(backends.extension(), str) else backends.extension().simd_levels()

PROGRAM = """
import hashlib, sys, torch
from pyattr import backends, ops, testing
assert backends.extension().simd_level() == sys.argv[1]
digest = hashlib.sha256()
sparse = lambda grads, proj_dim, column_offset, backend: ops.sparse_project(
    grads, proj_dim, nonzeros=2, column_offset=column_offset, num_columns=column_offset + grads.shape[1], backend=backend)
hadamard = lambda grads, proj_dim, column_offset, backend: ops.hadamard_project(grads, proj_dim, backend=backend)
for op in (ops.rademacher_project, ops.gaussian_project, hadamard, sparse):
    for dtype in testing.DTYPES:
        for shape, proj_dim, offset in (((1, 40_000), 50, 3), ((4, 700), 130, 0), ((7, 300), 19, 127), ((33, 900), 70, 64)):
            grads = testing.make_gradients(*shape, dtype)
            out = op(grads, proj_dim, column_offset=offset, backend="cpu")
            exact = op(grads.double(), proj_dim, column_offset=offset, backend="reference")
            assert ((out - exact).abs() <= testing.projection_bound(grads, 1.0, 2.0**-18)).all()
            digest.update(out.numpy().tobytes())
for shape in ((2, 220, 600, 9), (1, 100, 2100, 7), (3, 4, 50, 8)):  # positions decide how many columns are formed together
    generator = torch.Generator().manual_seed(1)
    acts = torch.randn(shape[0], shape[1], shape[2], generator=generator)
    errs = torch.randn(shape[0], shape[1], shape[3], generator=generator)
    out = ops.linear_grad_project(acts, errs, 96, kind="sparse", backend="cpu")
    exact = ops.linear_grad_project(acts.double(), errs.double(), 96, kind="sparse", backend="reference")
    assert (out - exact).abs().max() <= 1e-5 * exact.abs().max()
    digest.update(out.numpy().tobytes())
for proj_dim, nonzeros, offset in ((96, 2, 5), (40, 5, 128), (12, 3, 77)):
    coefficients = testing.make_gradients(3, proj_dim)
    out = ops.sparse_project_transpose(coefficients, 9000, nonzeros=nonzeros, column_offset=offset, backend="cpu")
    digest.update(out.numpy().tobytes())
print(digest.hexdigest())
"""


def run(level):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, level],
        env=os.environ | {"PYATTR_SIMD": level},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(not LEVELS, reason="pyattr._C is not built")
def test_every_level_gives_the_same_bits():
    digests = {}
    for level in LEVELS:
        done = run(level)
        assert done.returncode == 0, done.stderr
        digests[level] = done.stdout
    assert len(set(digests.values())) == 1, digests


LACKING = [level for level in ("avx2", "avx512") if level not in LEVELS]


@pytest.mark.skipif(not LEVELS, reason="pyattr._C is not built")
@pytest.mark.parametrize("level", ["sse9", *LACKING[:1]])
def test_a_level_that_is_not_there_is_refused_by_name(level):
    """By the op whether it chooses the backend or is told, and by `info`, which prints its table all the same."""
    refusal = f"PYATTR_SIMD must be one of {', '.join(LEVELS)} on this machine, got '{level}'"
    for backend in (None, "cpu"):
        program = (
            f"import torch\nfrom pyattr.ops import *\nrademacher_project(torch.zeros(1, 2), 3, backend={backend!r})"
        )
        done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYATTR_SIMD": level}, **OUTPUT)
        assert done.returncode != 0 and "BackendError: rademacher_project: " in done.stderr and refusal in done.stderr
    wide = {"PYATTR_SIMD": level, "COLUMNS": "250"}
    done = subprocess.run([sys.executable, "-m", "pyattr", "info"], env=os.environ | wide, **OUTPUT)
    assert done.returncode == 0 and refusal in done.stdout
    assert "reference" in done.stdout and "usable" in done.stdout


OUTPUT = {"capture_output": True, "text": True}
