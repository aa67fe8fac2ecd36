"""Which backends the tests of a GPU run with; what one of them cannot run is skipped with its own reasons."""

import pytest
import torch

from pyattr import backends


def needs(op, backend):
    """Skip a test unless a backend of an op runs on a GPU here."""
    reasons = backends.report()[op][backend]
    if backend == "triton" and not reasons and not torch.cuda.is_available():
        reasons = ["torch sees no CUDA device"]  # the interpreter alone
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))


def both(op):
    """Run a test, which takes a ``backend``, with CUDA and with Triton."""
    given = [pytest.param(name, marks=[pytest.mark.gpu, needs(op, name)]) for name in ("cuda", "triton")]
    return pytest.mark.parametrize("backend", given)
