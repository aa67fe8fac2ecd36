"""Every test starts from the same seed, and memory that nobody wrote is NaN."""

import os

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("pyattr", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("pyattr")

# cuBLAS is deterministic only with a fixed workspace, and reads this when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Poisons torch.empty and its kin: an output element that a kernel never wrote compares unequal to anything.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch):
    """A test chooses its backend itself; PYATTR_SIMD is read once per process and stays."""
    monkeypatch.delenv("PYATTR_BACKEND", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_report_header():
    from pyattr import backends

    return [f"pyattr: {backends.environment()}", f"PYATTR_SIMD={os.environ.get('PYATTR_SIMD', '')}"]
