"""The drop-ins on a real GPU give what they give on the CPU."""

from types import SimpleNamespace

import pytest
import torch

from pyattr.compat import bergson, fast_jl
from pyattr.compat.trak import Projector

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def integers(*shape, dtype=torch.float32):
    """Small ones, whose sums are exact on both."""
    return torch.randint(-4, 5, shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_projector(dtype):
    grads = {
        "weight": integers(6, 9, 11, dtype=dtype),
        "scale": integers(6, dtype=dtype),
        "bias": integers(6, 9, dtype=dtype),
    }
    on_gpu = {name: piece.cuda() for name, piece in grads.items()}
    expected = Projector(109, 700, 3, "rademacher").project(grads, 5)
    got = Projector(109, 700, 3, "rademacher").project(on_gpu, 5)
    assert got.is_cuda
    assert torch.equal(got.cpu(), expected)
    assert torch.equal(Projector(109, 700, 3, "rademacher", "cuda").project(grads, 5), got)
    assert torch.equal(Projector(109, 700, 3, "rademacher", "cpu").project(on_gpu, 5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_jl(dtype):
    x = integers(40, 1000, dtype=dtype)
    got = fast_jl.project_rademacher_32(x.cuda(), 513, 7, 132)
    assert torch.equal(got.cpu(), fast_jl.project_rademacher_8(x, 513, 7, 108))
    normal = fast_jl.project_normal_16(x.cuda(), 513, 7, 132).cpu() - fast_jl.project_normal_16(x, 513, 7, 108)
    assert (normal.abs() <= 2.0**-14 * x.float().abs().sum(1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_matrix(dtype):
    for kind, tolerance in (("rademacher", 0.0), ("normal", 4e-6)):
        got = bergson.random_matrix("layer/left", 600, 1000, "cuda", kind, dtype)
        expected = bergson.random_matrix("layer/left", 600, 1000, "cpu", kind, dtype)
        assert got.is_cuda
        relative = torch.finfo(dtype).eps if tolerance else 0.0
        torch.testing.assert_close(got.cpu(), expected, rtol=relative, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_project_global(dtype, monkeypatch):
    monkeypatch.setattr(bergson, "BLOCK_ENTRIES", 64 * 70)
    monkeypatch.setattr(bergson, "TILE_ENTRIES", 200)
    g, a = integers(3, 2, 20, dtype=dtype), integers(3, 2, 30, dtype=dtype)
    bias, column = integers(3, 20, dtype=dtype), integers(30, dtype=dtype)
    parts = {"g": g, "a": a, "bias": bias, "bias_col": column}
    expected = bergson.project_global("layer/single", SimpleNamespace(**parts, divisor=None), 64, "rademacher")
    on_gpu = SimpleNamespace(**{name: part.cuda() for name, part in parts.items()}, divisor=None)
    got = bergson.project_global("layer/single", on_gpu, 64, "rademacher")
    assert got.is_cuda
    assert torch.equal(got.cpu(), expected)
