"""The CUDA kernel of code_topk, its own source, on an emulated thread block: no GPU needed.

See ``test_emulated_projection.py`` for the emulator. The rest of the op, limits and selection, is the op's own.
"""

import ctypes
import importlib

import pytest
import torch
from emulation import library

from pyattr.ops import TopK, _code_filter, code_topk
from pyattr.ops._codes import check_codes
from pyattr.reference.code_topk import centred_gram

op = importlib.import_module("pyattr.ops.code_topk")
GUARD = 16  # bytes after the flags that nobody may touch


class FlagsArgs(ctypes.Structure):
    _fields_ = [
        ("codes", ctypes.c_void_p), ("num_codes", ctypes.c_int64), ("members", ctypes.c_int), ("rows", ctypes.c_void_p),
        ("limits", ctypes.c_void_p), ("largest", ctypes.c_bool), ("flags", ctypes.c_void_p),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    compiled = library("codes", tmp_path_factory.mktemp("emulator"))
    compiled.code_topk.restype = ctypes.c_char_p
    return compiled


def launch(compiled, codes, n, rows, bounds, largest, flags, reverse=False):
    guarded = torch.full((len(flags) + GUARD,), 0xA5, dtype=torch.uint8)
    args = FlagsArgs(codes.data_ptr(), len(codes), n, rows.data_ptr(), bounds.data_ptr(), largest, guarded.data_ptr())
    assert compiled.code_topk(ctypes.byref(args), int(reverse)) == b""
    assert (guarded[len(flags) :] == 0xA5).all()
    flags.copy_(guarded[: len(flags)])


@pytest.fixture
def emulated(compiled, monkeypatch):
    """``emulated(gram, codes, k, largest)``, of launches of 24, 96, 384, ... codes."""
    monkeypatch.setattr(op, "FIRST", 24)

    def run(gram, codes, k, largest=True):
        flag = lambda *arguments: launch(compiled, *arguments)  # noqa: E731
        return TopK(*op._run_flagged(flag)(gram, check_codes("code_topk", codes)[0], k, largest))

    return run


def problem(n, weights, count, seed=0):
    """A Gram matrix of a spectrum that falls, and codes of these weights."""
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(50, n, generator=generator, dtype=torch.float64) / torch.arange(1, n + 1).sqrt()
    orders = torch.rand(count, n, generator=generator).argsort(1)
    heights = torch.tensor(weights)[torch.arange(count) % len(weights)]
    bits = (orders < heights[:, None]).long()
    return jacobian.T @ jacobian, (bits << torch.arange(n)).sum(1)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("n", [2, 3, 15, 16, 17, 24, 32, 33, 48, 49, 64])
def test_the_best_codes(emulated, n, largest):
    gram, codes = problem(n, [n // 2, n // 2, n - 1, 0] if n < 40 else [n // 2], 333)
    for k in (1, 7):
        found, expected = (
            emulated(gram, codes, k, largest),
            code_topk(gram, codes, k, largest=largest, backend="reference"),
        )
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("n", [5, 24, 40, 64])
def test_flags_are_those_of_the_integer_form(compiled, n):
    """Bit for bit, whichever thread comes first; limits in the middle of what there is, none of another weight."""
    gram, codes = problem(n, [n // 2, max(n // 3, 1)], 203)
    rounded = _code_filter.integers(_code_filter.factor(centred_gram(gram)[0]))
    whole = (256 * rounded.integers[0].long() + rounded.integers[1])[:n, :n]
    bits = (codes[:, None] >> torch.arange(n)) & 1
    squares = (bits @ whole.T).square().sum(1)
    limits = torch.full((65,), float("inf"))
    limits[n // 2] = float(squares[bits.sum(1) == n // 2].double().median() * 1.001)
    expected = squares.double() >= limits[bits.sum(1)]
    assert 10 < expected.sum() < 60
    for reverse in (False, True):
        flags = torch.empty(-(-len(codes) // 8), dtype=torch.uint8)
        launch(compiled, codes, n, rounded.integers, limits, True, flags, reverse)
        assert torch.equal(((flags[:, None] >> torch.arange(8)) & 1).flatten()[: len(codes)].bool(), expected)


@pytest.mark.parametrize("bad", [1 << 24, (1 << 24) - 1, -1])
def test_bad_codes_are_flagged_wherever_they_are(emulated, bad):
    gram, codes = problem(24, [12], 333)
    codes[[300, 310]] = torch.tensor([bad, -1])
    with pytest.raises(ValueError, match=r"at \[300\]$"):
        emulated(gram, codes, 3)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 23])
def test_few_codes(emulated, count):
    gram, codes = problem(24, [12], count)
    found = emulated(gram, codes, count)
    assert sorted(found.indices.tolist()) == list(range(count))
