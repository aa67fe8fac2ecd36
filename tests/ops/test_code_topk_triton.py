"""The Triton kernel of code_topk without a GPU: compiled for one, and run by Triton's interpreter in a child process."""

import importlib

import pytest
import torch
from triton_without_gpu import compile_for_gpu, interpreted, not_interpreted, run_interpreted

from pyattr.ops import code_topk


@not_interpreted
def test_under_the_interpreter():
    run_interpreted(__file__)


@not_interpreted
@pytest.mark.parametrize("members", [32, 64])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_a_gpu(members, capability):
    from pyattr.triton_kernels.code_topk import code_topk_kernel

    types = {"codes_ptr": "*i64", "outside": "i64", "rows_ptr": "*i8", "limits_ptr": "*fp32", "flags_ptr": "*u8"}
    own = {"LARGEST": True, "MEMBERS": members, "BLOCK": 128}
    ptx = compile_for_gpu(code_topk_kernel, types, own, capability=capability)["ptx"]
    assert "s32.s8.s8" in ptx  # integer tensor cores, mma.sync or wgmma


def problem(n, weights, count):
    jacobian = torch.randn(30, n, dtype=torch.float64) / torch.arange(1, n + 1).sqrt()
    heights = torch.tensor(weights)[torch.arange(count) % len(weights)]
    bits = torch.rand(count, n).argsort(1) < heights[:, None]
    return jacobian.T @ jacobian, (bits.long() << torch.arange(n)).sum(1)


@pytest.fixture(autouse=True)
def small_launches(monkeypatch):
    monkeypatch.setattr(importlib.import_module("pyattr.ops.code_topk"), "FIRST", 24)


@interpreted
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("n", [2, 7, 24, 32, 33, 64])
def test_the_best_codes(n, largest):
    gram, codes = problem(n, [n // 2, n // 2, n - 1, 0], 700)
    for k in (1, 9):
        found, expected = (code_topk(gram, codes, k, largest=largest, backend=b) for b in ("triton", "reference"))
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.values, expected.values)


@interpreted
@pytest.mark.parametrize("n", [24, 64])
def test_few_of_many_are_flagged(n, monkeypatch):
    """The exact values of some tenth are formed, not of all."""
    op = importlib.import_module("pyattr.ops.code_topk")
    formed, exact = [], op.reference.relative_squares
    monkeypatch.setattr(
        op.reference, "relative_squares", lambda matrix, codes: formed.append(len(codes)) or exact(matrix, codes)
    )
    gram, codes = problem(n, [n // 2], 3000)
    code_topk(gram, codes, 3, backend="triton")
    assert sum(formed) < 500


@interpreted
@pytest.mark.parametrize("bad", [1 << 24, (1 << 24) - 1, 1 << 40, -1])
def test_bad_codes_are_flagged_wherever_they_are(bad):
    gram, codes = problem(24, [12], 700)
    codes[[600, 650]] = torch.tensor([bad, -1])
    with pytest.raises(ValueError, match=r"at \[600\]$"):
        code_topk(gram, codes, 3, backend="triton")


@interpreted
@pytest.mark.parametrize("count", [1, 8, 23, 129])
def test_few_codes(count):
    gram, codes = problem(24, [12], count)
    assert sorted(code_topk(gram, codes, count, backend="triton").indices.tolist()) == list(range(count))
