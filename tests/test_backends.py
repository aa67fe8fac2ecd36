"""Which backend runs: what each refuses, on the very inputs it is given."""

from types import SimpleNamespace

import pytest
import torch

from pyattr import backends


@pytest.mark.parametrize("op", ("rademacher_project", "gaussian_project"))
@pytest.mark.parametrize("name", ("cuda", "triton"))
def test_the_gpu_that_holds_the_gradients_is_the_one_that_is_asked(op, name, monkeypatch):
    """Of two GPUs the first may do and the second not; the current one is no matter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends.report()  # declares the ops
    [record] = [b for b in backends._REGISTRY[op] if b.name == name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5) if device.index else (9, 0))
    first, second = (SimpleNamespace(device=torch.device("cuda", i), dtype=torch.bfloat16) for i in range(2))
    assert record.unsupported(first, 8, 0, 0, 0, 1.0) == []
    assert record.unsupported(second, 8, 0, 0, 0, 1.0) == ["needs compute capability 8.0, cuda:1 has 7.5"]
