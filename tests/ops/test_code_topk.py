"""code_topk on every usable backend: against |J w| itself, exact rationals, and by what must not matter."""

import importlib
import itertools
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattr import testing
from pyattr.ops import TopK, code_topk

ROOT = Path(__file__).resolve().parents[2]
op = importlib.import_module("pyattr.ops.code_topk")
BACKENDS = testing.usable_backends("code_topk")
everywhere = pytest.mark.parametrize("backend", BACKENDS)


def jacobian_of(n, rows=60, seed=0):
    """[rows, n], of a spectrum that falls and a common mode."""
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(rows, n, generator=generator, dtype=torch.float64) / torch.arange(1, n + 1).sqrt()
    return jacobian @ torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q + 3


def codes_of(n, count, weights=None, seed=0):
    """[count] int64 codes, of n // 2 bits or of these weights in turn."""
    generator = torch.Generator().manual_seed(seed)
    heights = torch.tensor(weights or [n // 2])[torch.arange(count) % len(weights or [0])]
    bits = torch.rand(count, n, generator=generator).argsort(1) < heights[:, None]
    return (bits.long() << torch.arange(n)).sum(1)


def norms(jacobian, codes):
    """|J w|, directly."""
    n = jacobian.shape[1]
    found = []
    for piece in codes.split(1 << 14):
        bits = ((piece[:, None] >> torch.arange(n)) & 1).double()
        weights = (1 - bits) / (n - bits.sum(1, keepdim=True)) - 1 / n
        found.append((weights @ jacobian.T).norm(dim=1))
    return torch.cat(found)


def search(gram, codes, k, backend, **options):
    device = testing.device_of(backend)
    found = code_topk(gram.to(device), codes.to(device), k, backend=backend, **options)
    return TopK(*(part.cpu() for part in found))


def same(one, other):
    return torch.equal(one.indices, other.indices) and torch.equal(one.values, other.values)


@everywhere
def test_two_members_by_hand(backend):
    """J w = +-(1.5, 2) for either member alone; an item that no member saw changes nothing."""
    jacobian = torch.tensor([[1.0, 4.0], [2.0, 6.0]], dtype=torch.float64)
    found = search(jacobian.T @ jacobian, torch.tensor([0, 2, 1, 2]), 4, backend)
    assert found.values.tolist() == [2.5, 2.5, 2.5, 0.0]
    assert found.indices.tolist() == [1, 2, 3, 0]


@everywhere
def test_three_members_by_hand(backend):
    """Codes 001, 011, 101, 110: w = (-2, 1, 1) / 6, (-1, -1, 2) / 3, (-1, 2, -1) / 3, (2, -1, -1) / 3."""
    jacobian = torch.tensor([[6.0, 0.0, 0.0], [0.0, 6.0, 12.0]], dtype=torch.float64)
    gram, codes = jacobian.T @ jacobian, torch.tensor([0b001, 0b011, 0b101, 0b110])
    found = search(gram, codes, 4, backend)
    torch.testing.assert_close(found.values, torch.tensor([52.0, 40.0, 13.0, 4.0]).double().sqrt(), rtol=1e-15, atol=0)
    assert found.indices.tolist() == [3, 1, 0, 2]
    found = search(gram, codes, 2, backend, largest=False)
    torch.testing.assert_close(found.values, torch.tensor([4.0, 13.0]).double().sqrt(), rtol=1e-15, atol=0)
    assert found.indices.tolist() == [2, 0]


@pytest.mark.skipif("cpu" not in BACKENDS, reason="pyattr._C is not built")
@pytest.mark.parametrize(("n", "count"), [(24, 200_000), (40, 200_000), (64, 1_000_000)])
def test_every_value_is_the_norm(n, count):
    jacobian, codes = jacobian_of(n, rows=20), codes_of(n, count)
    found = code_topk(jacobian.T @ jacobian, codes, count, backend="cpu")
    assert torch.equal(found.indices.sort().values, torch.arange(count))
    torch.testing.assert_close(found.values, norms(jacobian, codes)[found.indices], rtol=1e-9, atol=0)
    for largest in (True, False):
        few = code_topk(jacobian.T @ jacobian, codes, 50, largest=largest, backend="cpu")
        order = slice(0, 50) if largest else slice(count - 50, count)
        assert torch.equal(few.values.sort().values, found.values[order].sort().values)


@everywhere
def test_every_code_of_20_members_of_weight_10(backend):
    """A code and its complement tie, whichever comes first; beyond that the order is that of |J w|."""
    codes = torch.tensor([sum(1 << i for i in members) for members in itertools.combinations(range(20), 10)])
    jacobian = jacobian_of(20)
    found = search(jacobian.T @ jacobian, codes, len(codes), backend)
    torch.testing.assert_close(found.values, norms(jacobian, codes)[found.indices], rtol=1e-10, atol=0)
    one, other = found.indices.view(-1, 2).T
    assert torch.equal(codes[one] ^ codes[other], torch.full_like(one, (1 << 20) - 1))
    assert (one < other).all()
    assert torch.equal(found.values[::2], found.values[1::2])
    top = search(jacobian.T @ jacobian, codes, 100, backend)
    assert same(top, TopK(found.values[:100], found.indices[:100]))
    low = search(jacobian.T @ jacobian, codes, 100, backend, largest=False)
    assert torch.equal(low.values, found.values.flip(0)[:100])


@st.composite
def integer_problems(draw):
    n = draw(st.integers(2, 12))
    jacobian = draw(st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=3))
    codes = draw(st.lists(st.integers(0, (1 << n) - 2), min_size=1, max_size=40))
    return n, jacobian, codes, draw(st.integers(1, len(codes))), draw(st.booleans())


@everywhere
@given(problem=integer_problems())
def test_order_and_ties_are_those_of_exact_rationals(backend, problem):
    n, jacobian, codes, k, largest = problem
    squares = []
    for code in codes:
        bits = [code >> i & 1 for i in range(n)]
        w = [Fraction(1 - c, n - sum(bits)) - Fraction(1, n) for c in bits]
        squares.append(sum(sum(x * y for x, y in zip(row, w, strict=True)) ** 2 for row in jacobian))
    order = sorted(range(len(codes)), key=lambda i: (-squares[i] if largest else squares[i], i))[:k]
    matrix = torch.tensor(jacobian, dtype=torch.float64)
    found = search(matrix.T @ matrix, torch.tensor(codes), k, backend, largest=largest)
    assert found.indices.tolist() == order
    expected = torch.tensor([float(squares[i]) for i in order]).double()
    torch.testing.assert_close(found.values.square(), expected, rtol=1e-6, atol=0)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="pyattr._C is not built")
@given(
    n=st.integers(2, 64),
    count=st.integers(1, 1500),
    share=st.floats(0, 1),
    distinct=st.integers(1, 1500),
    largest=st.booleans(),
    seed=st.integers(0, 99),
)
def test_backends_agree_to_the_bit(n, count, share, distinct, largest, seed):
    weights = [n // 2, max(n // 2 - 1, 0), n - 1, n // 3]
    codes = codes_of(n, distinct, weights, seed)[torch.arange(count) % distinct]
    jacobian, k = jacobian_of(n, seed=seed), 1 + int(share * (count - 1))
    gram = jacobian.T @ jacobian
    found = [search(gram, codes, k, backend, largest=largest) for backend in BACKENDS]
    assert all(same(other, found[0]) for other in found[1:])


@everywhere
def test_members_in_another_order(backend):
    n = 17
    jacobian, codes = jacobian_of(n), codes_of(n, 900, [8, 5])
    order = torch.randperm(n)
    bits = (codes[:, None] >> order) & 1
    permuted = jacobian[:, order]
    one = search(jacobian.T @ jacobian, codes, 30, backend)
    other = search(permuted.T @ permuted, (bits << torch.arange(n)).sum(1), 30, backend)
    assert torch.equal(one.indices, other.indices)
    torch.testing.assert_close(one.values, other.values, rtol=1e-9, atol=0)


@everywhere
def test_a_common_mode_of_a_million_falls_out(backend):
    """Whole numbers, so that G itself is exact although the common mode is 1e14 times what matters."""
    jacobian = torch.randint(-9, 10, (5, 30)).double()
    common = jacobian + 10_000_000
    codes = codes_of(30, 1000)
    found = search(common.T @ common, codes, 1000, backend)
    assert same(found, search(jacobian.T @ jacobian, codes, 1000, backend))
    torch.testing.assert_close(found.values, norms(jacobian, codes)[found.indices], rtol=1e-12, atol=0)


@everywhere
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("kind", ["flat", "zero", "negative", "one mode", "indefinite"])
def test_gram_matrices_that_tell_little(backend, kind, largest):
    """Where all tie the first k are it; where rounding or a negative form hides the order it is still that of the reference."""
    n, codes = 24, codes_of(24, 3000)
    mode = torch.arange(n, dtype=torch.float64)
    gram = {
        "flat": torch.eye(n, dtype=torch.float64),
        "zero": torch.zeros(n, n, dtype=torch.float64),
        "negative": -torch.eye(n, dtype=torch.float64),
        "one mode": torch.outer(mode, mode),
        "indefinite": torch.outer(mode, mode) - 40 * torch.eye(n, dtype=torch.float64),
    }[kind]
    found = search(gram, codes, 20, backend, largest=largest)
    assert same(found, search(gram, codes, 20, "reference", largest=largest))
    if kind in ("flat", "zero", "negative"):
        assert found.indices.tolist() == list(range(20))
        value = (1 / 24) ** 0.5 if kind == "flat" else 0.0
        torch.testing.assert_close(found.values, torch.full((20,), value, dtype=torch.float64), rtol=1e-12, atol=0)


@everywhere
def test_orders_that_never_stop_improving(backend):
    jacobian, codes = jacobian_of(32), codes_of(32, 20_000)
    gram = jacobian.T @ jacobian
    order = norms(jacobian, codes).argsort()
    for index in (order, order.flip(0)):
        for largest in (True, False):
            found = search(gram, codes[index], 5, backend, largest=largest)
            first = (index is order) == largest
            expected = range(19_999, 19_994, -1) if first else range(5)
            assert found.indices.tolist() == list(expected)


@everywhere
@pytest.mark.parametrize("n", [24, 40, 64])
@pytest.mark.parametrize("largest", [True, False])
def test_codes_whose_values_are_nearer_than_the_filter_can_tell(backend, n, largest):
    """Members all but alike in norm and orthogonal, so that all values lie within a few thousandths."""
    generator = torch.Generator().manual_seed(n)
    gram = torch.eye(n, dtype=torch.float64) + 1e-4 * torch.randn(n, n, generator=generator, dtype=torch.float64)
    gram, codes = gram + gram.T, codes_of(n, 20_000)
    found, every = (search(gram, codes, k, backend, largest=largest) for k in (300, 20_000))
    assert every.values.max() < 1.01 * every.values.min()
    assert same(found, TopK(every.values[:300], every.indices[:300]))


@everywhere
@pytest.mark.parametrize("exponent", [-1000, 900])
def test_any_magnitude(backend, exponent):
    jacobian, codes = jacobian_of(12), codes_of(12, 500)
    gram = jacobian.T @ jacobian
    found, scaled = (search(g, codes, 9, backend) for g in (gram, gram * 2.0**exponent))
    assert same(scaled, TopK(found.values * 2.0 ** (exponent // 2), found.indices))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="pyattr._C is not built")
def test_bits_do_not_depend_on_threads_nor_on_pieces(monkeypatch):
    jacobian, codes = jacobian_of(24), codes_of(24, 5_000)[torch.randint(0, 5000, (300_000,))]
    gram = jacobian.T @ jacobian
    expected = code_topk(gram, codes, 700, backend="reference")
    apart = torch.empty(300_000, 2, dtype=torch.int64)[:, 1].copy_(codes)
    monkeypatch.setattr(op, "PIECE", 70_001)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert same(code_topk(gram, codes, 700, backend="cpu"), expected)
        assert same(code_topk(gram, apart, 700, backend="cpu"), expected)


PROGRAM = """
from pyattr import backends
from tests.ops.test_code_topk import codes_of, jacobian_of, same, search
assert backends.extension().simd_level() == "scalar"
for n in (3, 15, 16, 24, 40, 64):
    jacobian, codes = jacobian_of(n), codes_of(n, 3001, [n // 2, n // 3])
    for largest in (True, False):
        found = [search(jacobian.T @ jacobian, codes, 11, backend, largest=largest) for backend in ("cpu", "reference")]
        assert same(*found)
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="pyattr._C is not built")
def test_the_scalar_level_in_a_process_of_its_own():
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, env=os.environ | {"PYATTR_SIMD": "scalar"}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@everywhere
def test_sizes(backend):
    gram = torch.eye(5, dtype=torch.float64)
    for codes, k in ((torch.empty(0, dtype=torch.int64), 0), (torch.tensor([3, 1]), 0)):
        found = search(gram, codes, k, backend)
        assert found.values.shape == found.indices.shape == (0,)
        assert (found.values.dtype, found.indices.dtype) == (torch.float64, torch.int64)
    assert search(gram, torch.tensor([3]), 1, backend).indices.tolist() == [0]
    with pytest.raises(ValueError, match=r"^code_topk: k must lie in \[0, 2\], got 3$"):
        search(gram, torch.tensor([3, 1]), 3, backend)


@everywhere
def test_none_are_valued_where_none_are_asked_for(backend, monkeypatch):
    monkeypatch.setattr(op.reference, "relative_squares", None)
    assert search(torch.eye(5, dtype=torch.float64), torch.tensor([3, 1]), 0, backend).indices.tolist() == []


@everywhere
def test_kinds_of_codes(backend):
    if testing.device_of(backend) != "cpu":
        pytest.skip("NumPy arrays are on the CPU")
    jacobian = jacobian_of(64)
    codes = codes_of(64, 100)
    assert (codes < 0).any()  # bit 63
    expected = code_topk(jacobian.T @ jacobian, codes, 9, backend=backend)
    assert same(code_topk(jacobian.T @ jacobian, codes.view(torch.uint64), 9, backend=backend), expected)
    found = code_topk((jacobian.T @ jacobian).numpy(), codes.numpy().view(np.uint64)[::-1][::-1], 9, backend=backend)
    assert isinstance(found.values, np.ndarray) and isinstance(found.indices, np.ndarray)
    assert same(TopK(*map(torch.from_numpy, found)), expected)


@everywhere
@pytest.mark.parametrize(
    ("n", "bad", "message"),
    [
        (20, (1 << 20) - 1, r"codes must leave a member without the item, got all 20 bits set at \[7\]"),
        (20, 1 << 20, r"codes must have no bit from n = 20 on, got 1048576 at \[7\]"),
        (20, -1, r"codes must have no bit from n = 20 on, got 18446744073709551615 at \[7\]"),
        (64, -1, r"codes must leave a member without the item, got all 64 bits set at \[7\]"),
    ],
)
@pytest.mark.parametrize("k", [0, 1, 3000])
def test_bad_codes(backend, n, bad, message, k):
    """The first of them is named, wherever the others are and whatever was found before."""
    codes = codes_of(n, 3000)
    codes[[7, 8, 1500, 2999]] = torch.tensor([bad, -1, bad, -1])
    with pytest.raises(ValueError, match=f"^code_topk: {message}$"):
        search(jacobian_of(n).T @ jacobian_of(n), codes, k, backend)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="pyattr._C is not built")
def test_the_first_bad_code_of_many_threads():
    codes = codes_of(20, 1000).repeat(400)
    codes[[200_000, 200_001, 399_999]] = -1
    torch.set_num_threads(3)
    with pytest.raises(ValueError, match=r"got 18446744073709551615 at \[200000\]$"):
        code_topk(jacobian_of(20).T @ jacobian_of(20), codes, 3, backend="cpu")


GRAM, CODES = torch.eye(3, dtype=torch.float64), torch.tensor([1, 2])
UNEVEN = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
NOT_FINITE = torch.tensor([[1.0, 2.0], [2.0, float("inf")]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("gram", "codes", "options", "error", "message"),
    [
        (GRAM.float(), CODES, {}, TypeError, "gram must be float64, got torch.float32"),
        (GRAM[:2], CODES, {}, ValueError, "gram must have shape [n, n] with n from 2 to 64, got [2, 3]"),
        (GRAM[:1, :1], CODES, {}, ValueError, "gram must have shape [n, n] with n from 2 to 64, got [1, 1]"),
        (
            torch.eye(65).double(),
            CODES,
            {},
            ValueError,
            "gram must have shape [n, n] with n from 2 to 64, got [65, 65]",
        ),
        (UNEVEN, CODES, {}, ValueError, "gram must be symmetric, got 2.0 at [0, 1] and 3.0 at [1, 0]"),
        (NOT_FINITE, CODES, {}, ValueError, "gram must be finite, got inf at [1, 1]"),
        ([[1.0]], CODES, {}, TypeError, "gram must be a torch tensor, NumPy array or CuPy array, got list"),
        (GRAM.to_sparse(), CODES, {}, TypeError, "gram must be a dense (strided) tensor"),
        (GRAM, CODES.to_sparse(), {}, TypeError, "codes must be a dense (strided) tensor"),
        (GRAM, CODES.int(), {}, TypeError, "codes must be uint64, or int64 of the same bits, got torch.int32"),
        (GRAM, CODES[None], {}, ValueError, "codes must have shape [N], got [1, 2]"),
        (GRAM, [1, 2], {}, TypeError, "codes must be a torch tensor, NumPy array or CuPy array, got list"),
        (GRAM, CODES, {"k": -1}, ValueError, "k must lie in [0, 2], got -1"),
        (GRAM, CODES, {"k": 1.0}, TypeError, "k must be an integer, got float"),
        (GRAM, CODES, {"largest": 1}, TypeError, "largest must be a bool, got int"),
        (GRAM, CODES, {"backend": "gpu"}, ValueError, "backend must be one of cuda, triton, cpu, reference, got 'gpu'"),
    ],
)
def test_arguments(gram, codes, options, error, message):
    with pytest.raises(error) as raised:
        code_topk(gram, codes, **({"k": 1} | options))
    assert str(raised.value) == f"code_topk: {message}"


def test_asymmetry_of_rounding_is_averaged():
    jacobian, codes = jacobian_of(9), codes_of(9, 99)
    gram = jacobian.T @ jacobian
    uneven = gram + 1e-7 * torch.triu(gram, 1) - 1e-7 * torch.tril(gram, -1)
    found, expected = (code_topk(g, codes, 99) for g in (uneven, gram))
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-12, atol=0)
