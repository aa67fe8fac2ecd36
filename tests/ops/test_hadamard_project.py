"""The Hadamard projection: known answers, every backend against the definition, and the properties it promises."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from pyattr import testing
from pyattr.backends import BackendError
from pyattr.ops import hadamard_project
from pyattr.reference.hadamard_project import hadamard_matrix
from pyattr.reference.permutation import permutation
from pyattr.reference.philox import philox4x32_10

BACKENDS = testing.usable_backends("hadamard_project")
FAST = [name for name in BACKENDS if name != "reference"]
CPU = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
# Forward error against the float64 definition, relative to sum |g|.
ERROR = {"cpu": 2.0**-21, "reference": 2.0**-23, "cuda": 2.0**-19, "triton": 2.0**-19}


def matrix(proj_dim, num_columns, seed=0, stream=0):
    return hadamard_matrix(torch.arange(proj_dim), torch.arange(num_columns), num_columns, seed, stream)


def check(backend, grads, proj_dim, seed=0, stream=0, scale=1.0):
    """A backend's result against the matrix written out, on awkward and ordinary inputs alike."""
    out = hadamard_project(grads, proj_dim, seed=seed, stream=stream, scale=scale, backend=backend)
    assert out.shape == (grads.shape[0], proj_dim) and out.dtype == torch.float32 and out.device == grads.device
    wide = grads.cpu().to(torch.float64)
    expected = wide @ matrix(proj_dim, grads.shape[1], seed, stream).T * scale
    bound = testing.projection_bound(grads.cpu(), scale, ERROR[backend]) + expected.abs() * 2.0**-24
    assert ((out.cpu() - expected).abs() <= bound).all()


# The matrix


def test_matrix_is_rows_of_scipys_hadamard_matrix_times_signs():
    """Sylvester's construction, against another library's; the signs are bits of the generator's words in order."""
    seed, stream, num_columns, order = 7, 9, 200, 256
    words = [int(w) for call in (0, 1) for w in philox4x32_10((call, 0, 4, 0), (seed, stream))]
    signs = np.array([1 if words[p // 32] >> p % 32 & 1 else -1 for p in range(num_columns)])
    rows = permutation(torch.arange(order), order, seed, stream).numpy()
    expected = hadamard(order)[rows, :num_columns] * signs
    assert np.array_equal(matrix(order, num_columns, seed, stream).numpy(), expected)


def test_pinned_matrix():
    """Rows that must never change: stored features depend on them."""

    def shown(entries):
        return ["".join("+" if e > 0 else "-" for e in row) for row in entries]

    assert shown(matrix(3, 20)) == PINNED
    last = hadamard_matrix(torch.tensor([2**39 - 1]), torch.arange(2**39 - 20, 2**39), 2**39, 2**32 - 1, 2**32 - 1)
    assert shown(last) == PINNED_LAST


PINNED = ["+++++--+-++-+---+-+-", "+--+++++++++---+++--", "++--+-+-+-+--+--+--+"]
PINNED_LAST = ["++-++++-++-+-+---+--"]


@pytest.mark.parametrize("backend", FAST)
def test_backend_multiplies_by_this_very_matrix(backend):
    """Projecting unit vectors reads the matrix, across the edges of calls, blocks and chunks."""
    for columns, proj_dim in ((1, 1), (2, 2), (3, 4), (100, 128), (257, 400), (1025, 9)):
        identity = torch.eye(columns, device=testing.device_of(backend))
        out = hadamard_project(identity, proj_dim, seed=7, stream=11, backend=backend)
        assert torch.equal(out.cpu().double(), matrix(proj_dim, columns, 7, 11).T)


# Values


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_worked_case(backend):
    """P = 3, so N = 4: every row of H_4 once, in the order and with the signs of the pinned matrix."""
    grads = torch.tensor([[1.0, 2.0, 4.0]], device=testing.device_of(backend))
    out = hadamard_project(grads, 4, scale=-0.5, backend=backend)[0].tolist()
    assert out == HAND_WORKED
    assert hadamard_project(grads, 2, scale=-0.5, backend=backend)[0].tolist() == HAND_WORKED[:2]


HAND_WORKED = [-3.5, -1.5, 2.5, 0.5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("num_samples", (0, 1, 2, 9))
def test_against_the_definition(backend, dtype, num_samples):
    for num_columns, proj_dim in ((0, 1), (1, 1), (129, 7), (1000, 33), (1000, 1024), (5000, 3)):
        grads = testing.make_gradients(num_samples, num_columns, dtype, testing.device_of(backend))
        check(backend, grads, proj_dim, seed=3, stream=1, scale=0.25)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", ((3, 100_001, 5), (2, 40_000, 300), (11, 9000, 66), (1, 3000, 4096)))
def test_several_blocks_and_chunks(backend, shape):
    num_samples, num_columns, proj_dim = shape
    grads = testing.make_gradients(num_samples, num_columns, device=testing.device_of(backend))
    check(backend, grads, proj_dim, seed=2**32 - 1)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(
    num_samples=st.integers(0, 12),
    num_columns=st.integers(0, 700),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(backend, num_samples, num_columns, share, seed):
    grads = testing.make_gradients(num_samples, num_columns, device=testing.device_of(backend), seed=seed)
    limit = 1 << max(num_columns - 1, 0).bit_length()
    check(backend, grads, max(1, round(share * limit)), seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_strides(backend, dtype):
    base = testing.make_gradients(12, 1200, dtype, device=testing.device_of(backend))
    for grads in (base[::2, ::3], base.T.contiguous().T, base[:, :1].expand(12, 300), base[3:4], base[:, 5:1158]):
        same = hadamard_project(grads.contiguous(), 20, backend=backend)
        assert torch.equal(hadamard_project(grads, 20, backend=backend), same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_values_reach_the_whole_row_and_no_other(backend):
    grads = testing.make_gradients(12, 1500, device=testing.device_of(backend))
    grads[2, 130], grads[5, 1499], grads[7, 0], grads[7, 1300] = float("nan"), float("inf"), float("inf"), -float("inf")
    out = hadamard_project(grads, 40, backend=backend).cpu()
    entries = matrix(40, 1500)
    assert out[2].isnan().all()
    assert torch.equal(out[5].double(), entries[:, 1499] * float("inf"))
    assert torch.equal(out[7].isnan(), entries[:, 0] == entries[:, 1300])
    others = [b for b in range(12) if b not in (2, 5, 7)]
    assert out[others].isfinite().all()


# Same bits


@pytest.mark.parametrize("backend", FAST)
def test_bits_do_not_depend_on_batch_or_run(backend):
    grads = testing.make_gradients(19, 20_000, device=testing.device_of(backend))
    whole = hadamard_project(grads, 100, backend=backend)
    assert torch.equal(hadamard_project(grads, 100, backend=backend), whole)
    for sizes in ((1, 18), (8, 8, 3), (9, 10)):
        pieces = [hadamard_project(g, 100, backend=backend) for g in grads.split(sizes)]
        assert torch.equal(torch.cat(pieces), whole)


@CPU
@pytest.mark.parametrize("shape", ((1, 100_000, 7), (20, 70_000, 150), (5, 3000, 700)))
def test_bits_do_not_depend_on_threads(shape):
    num_samples, num_columns, proj_dim = shape
    grads = testing.make_gradients(num_samples, num_columns)
    torch.set_num_threads(1)
    one = hadamard_project(grads, proj_dim, backend="cpu")
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(hadamard_project(grads, proj_dim, backend="cpu"), one)


# What the projection keeps


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_together_are_an_isometry(backend):
    """D = N and scale N^-1/2: |Y| = |g| to rounding, for a P that is no power of two too."""
    for num_columns in (64, 100):
        grads = torch.randn(5, num_columns, device=testing.device_of(backend))
        order = 64 if num_columns == 64 else 128
        out = hadamard_project(grads, order, seed=5, scale=order**-0.5, backend=backend)
        torch.testing.assert_close(out @ out.T, grads @ grads.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_columns", "order", "proj_dim"), ((200, 256, 150), (300, 512, 400)))
def test_inner_products_have_the_mean_and_the_variance_of_theory(num_columns, order, proj_dim):
    """Over seeds: E = D <x, x'>, Var = D (N - D) / (N - 1) * (|x|^2 |x'|^2 + <x, x'>^2 - 2 sum x^2 x'^2)."""
    seeds = 300
    x = torch.randn(2, num_columns, dtype=torch.float64)
    x[1] += 0.5 * x[0]
    outs = torch.stack([hadamard_project(x, proj_dim, seed=s, stream=1) for s in range(seeds)])
    found = (outs[:, 0] * outs[:, 1]).sum(1)
    squares, product = x.square().sum(1), (x[0] * x[1]).sum()
    spread = squares[0] * squares[1] + product**2 - 2 * (x[0] * x[1]).square().sum()
    variance = proj_dim * (order - proj_dim) / (order - 1) * spread
    assert abs(found.mean() - proj_dim * product) < 4 * (variance / seeds) ** 0.5
    # The sample variance scatters by about sqrt(2 / seeds) = 8%. A dense sign matrix, without the factor (N - D) / (N - 1),
    # is 2.4 and 4.6 times as spread.
    assert 0.7 < found.var() / variance < 1.3


# Derivatives


@pytest.mark.parametrize("backend", BACKENDS)
def test_transpose_is_the_adjoint(backend):
    grads = testing.make_gradients(3, 1000, device=testing.device_of(backend)).requires_grad_()
    cotangent = torch.randn(3, 50, device=grads.device)
    out = hadamard_project(grads, 50, seed=2, scale=0.5, backend=backend)
    (bar,) = torch.autograd.grad(out, grads, cotangent)
    expected = 0.5 * cotangent.cpu() @ matrix(50, 1000, 2).float()
    torch.testing.assert_close(bar.cpu(), expected, rtol=1e-5, atol=1e-4)


def test_gradcheck_in_both_modes_and_twice():
    grads = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)

    def function(g):
        return hadamard_project(g, 2, seed=1, scale=0.3, backend="reference")

    assert torch.autograd.gradcheck(function, grads, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda g: function(g).square(), grads, check_fwd_over_rev=True)


def test_forward_mode_and_vmap():
    x, x_dot = torch.randn(2, 3, 300)
    y, y_dot = torch.func.jvp(lambda g: hadamard_project(g, 20, seed=4), (x,), (x_dot,))
    assert torch.equal(y, hadamard_project(x, 20, seed=4)) and torch.equal(y_dot, hadamard_project(x_dot, 20, seed=4))
    both = torch.stack([x, x_dot])
    assert torch.equal(torch.func.vmap(lambda g: hadamard_project(g, 20, seed=4))(both), torch.stack([y, y_dot]))


def test_reference_and_transpose_hold_little_of_the_matrix(monkeypatch):
    """At most 2^20 entries at a time; the documentation's bound on memory rests on it."""
    module, entries = sys.modules["pyattr.reference.hadamard_project"], []

    def watched(rows, columns, *key, original=module.hadamard_matrix):
        entries.append(len(rows) * len(columns))
        return original(rows, columns, *key)

    monkeypatch.setattr(module, "hadamard_matrix", watched)
    grads = torch.randn(2, 2100, dtype=torch.float64, requires_grad=True)
    out = hadamard_project(grads, 1200, seed=1, scale=0.5)
    (bar,) = torch.autograd.grad(out, grads, out)
    assert max(entries) <= 2**20 and sum(entries) == 2 * 1200 * 2100
    torch.testing.assert_close(bar, 0.5 * out @ matrix(1200, 2100, 1))


# Arrays and errors


def test_numpy_in_numpy_out():
    grads = np.random.randn(3, 400).astype(np.float32)
    out = hadamard_project(grads[:, ::-1], 9)
    assert isinstance(out, np.ndarray) and out.dtype == np.float32
    np.testing.assert_array_equal(out, hadamard_project(grads[:, ::-1].copy(), 9))


def test_float64_stays_float64_on_the_reference():
    assert hadamard_project(torch.randn(2, 10, dtype=torch.float64), 3).dtype == torch.float64
    with pytest.raises(
        BackendError, match=r"grads is torch\.float64, this backend takes float16, bfloat16 and float32"
    ):
        hadamard_project(torch.randn(2, 10, dtype=torch.float64), 3, backend="cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"grads": torch.zeros(3)}, ValueError, "hadamard_project: grads must have shape [B, P], got [3]"),
        (
            {"grads": torch.zeros(1, 5, dtype=torch.int64)},
            TypeError,
            "hadamard_project: grads must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (
            {"proj_dim": 9},
            ValueError,
            "hadamard_project: proj_dim must be at most 8, the first power of two from P = 5 on, got 9",
        ),
        (
            {"grads": torch.zeros(2, 8), "proj_dim": 9},
            ValueError,
            "hadamard_project: proj_dim must be at most 8, the first power of two from P = 8 on, got 9",
        ),
        (
            {"grads": torch.zeros(2, 0), "proj_dim": 2},
            ValueError,
            "hadamard_project: proj_dim must be at most 1, the first power of two from P = 0 on, got 2",
        ),
        (
            {"grads": torch.zeros(1, 1).expand(1, 2**39 + 1)},
            ValueError,
            "hadamard_project: grads must have at most 549755813888 columns, got 549755813889",
        ),
        ({"proj_dim": 0}, ValueError, "hadamard_project: proj_dim must lie in [1, 4294967296], got 0"),
        ({"proj_dim": 2.5}, TypeError, "hadamard_project: proj_dim must be an integer, got float"),
        ({"seed": -1}, ValueError, "hadamard_project: seed must lie in [0, 4294967295], got -1"),
        ({"scale": None}, TypeError, "hadamard_project: scale must be a real number, got NoneType"),
    ),
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"grads": torch.zeros(2, 5), "proj_dim": 4} | change
    with pytest.raises(error) as caught:
        hadamard_project(**arguments)
    assert str(caught.value) == message


def test_takes_whole_vectors_only():
    with pytest.raises(TypeError, match="column_offset"):
        hadamard_project(torch.zeros(2, 5), 4, column_offset=1)
