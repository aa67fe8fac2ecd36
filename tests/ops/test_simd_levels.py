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
for op in (ops.rademacher_project, ops.gaussian_project):
    for dtype in testing.DTYPES:
        for shape, proj_dim, offset in (((1, 40_000), 50, 3), ((4, 700), 130, 0), ((7, 300), 19, 127), ((33, 900), 70, 64)):
            grads = testing.make_gradients(*shape, dtype)
            out = op(grads, proj_dim, column_offset=offset, backend="cpu")
            exact = op(grads.double(), proj_dim, column_offset=offset, backend="reference")
            assert ((out - exact).abs() <= testing.projection_bound(grads, 1.0, 2.0**-18)).all()
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


@pytest.mark.skipif(not LEVELS, reason="pyattr._C is not built")
def test_an_unknown_level_is_refused_by_name():
    done = run("sse9")
    assert done.returncode != 0
    assert f"PYATTR_SIMD must be one of {', '.join(LEVELS)} on this machine, got 'sse9'" in done.stderr
