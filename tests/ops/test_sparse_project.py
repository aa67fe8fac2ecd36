"""The sparse projection: its matrix, every backend against the definition, its variance, and the properties it promises."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattr import testing
from pyattr.backends import BackendError
from pyattr.ops import sketch_entries, sparse_project, sparse_project_transpose
from pyattr.reference.philox import philox4x32_10
from pyattr.reference.sparse_project import groups, lanes

BACKENDS = testing.usable_backends("sparse_project")
FAST = [name for name in BACKENDS if name != "reference"]
CPU = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
ERROR = 2.0**-20  # relative to sum |g|


def matrix(proj_dim, columns, nonzeros=1, seed=0, stream=0):  # -> [D, C] float64, built entry by entry
    rows, signs = sketch_entries(columns, proj_dim, nonzeros=nonzeros, seed=seed, stream=stream)
    out = torch.zeros(proj_dim, len(columns), dtype=torch.float64)
    for r in range(nonzeros):
        out[rows[:, r], torch.arange(len(columns))] += signs[:, r].double()
    return out


def project(grads, proj_dim, backend, column_offset=0, **options):
    return sparse_project(
        grads,
        proj_dim,
        backend=backend,
        column_offset=column_offset,
        num_columns=column_offset + grads.shape[1],
        **options,
    )


def check(backend, grads, proj_dim, nonzeros, offset=0, scale=1.0, **key):
    out = project(grads, proj_dim, backend, offset, nonzeros=nonzeros, scale=scale, **key)
    assert out.shape == (grads.shape[0], proj_dim) and out.dtype == torch.float32 and out.device == grads.device
    written = matrix(proj_dim, range(offset, offset + grads.shape[1]), nonzeros, **key)
    expected = grads.cpu().double() @ written.T * scale
    bound = testing.projection_bound(grads.cpu(), scale, ERROR) + expected.abs() * 2.0**-24
    assert ((out.cpu() - expected).abs() <= bound).all()


# The matrix


def test_the_matrix_by_hand():
    """D = 64, one nonzero: two blocks of 32 lanes, so tile 0 holds columns 0 to 63. a is an odd prime, so 1."""
    word = [int(w) for w in philox4x32_10([torch.tensor(c) for c in (0, 0, 2, 0)], (7, 9))]
    b, x = word[1] * 2 >> 32, word[2] % 32
    signs = [int(w) for w in philox4x32_10([torch.tensor(c) for c in (0, 0, 1, 0)], (7, 9))]
    rows, found = sketch_entries(range(64), 64, seed=7, stream=9)
    for i in range(64):
        assert rows[i, 0] == 32 * ((i // 32 + b) % 2) + (i % 32 ^ x)
        assert found[i, 0] == (1 if signs[i // 32] >> i % 32 & 1 else -1)


def test_pinned_entries():
    """Entries that must never change: stored features depend on them."""
    rows, signs = sketch_entries([0, 1, 31, 32, 4095, 4096, 10**6, 2**39 - 1], 4096, nonzeros=2, seed=42, stream=3)
    assert rows.tolist() == PINNED_ROWS
    assert signs.tolist() == PINNED_SIGNS
    assert sketch_entries([5, 2**33], 1000, seed=1)[0].tolist() == PINNED_ODD


PINNED_ROWS = [
    [1244, 2566],
    [1245, 2567],
    [1219, 2585],
    [2044, 3878],
    [1569, 2871],
    [1289, 2160],
    [387, 3000],
    [1147, 2548],
]
PINNED_SIGNS = [[1, 1], [1, 1], [-1, 1], [1, -1], [-1, -1], [1, 1], [1, 1], [1, 1]]
PINNED_ODD = [[547], [593]]


@given(
    proj_dim=st.integers(1, 300), nonzeros=st.integers(1, 8), tile=st.integers(0, 2**20), seed=st.integers(0, 2**32 - 1)
)
def test_no_two_columns_of_a_tile_meet_and_no_two_nonzeros_of_a_column(proj_dim, nonzeros, tile, seed):
    nonzeros = min(nonzeros, proj_dim)
    for r, (first, size) in enumerate(groups(proj_dim, nonzeros)):
        columns = size * lanes(proj_dim, nonzeros)
        rows, _ = sketch_entries(range(tile * columns, (tile + 1) * columns), proj_dim, nonzeros=nonzeros, seed=seed)
        low = first * lanes(proj_dim, nonzeros)
        assert sorted(rows[:, r].tolist()) == list(range(low, low + columns))
        assert all(len(set(row)) == nonzeros for row in rows.tolist())


def test_blocks_are_as_wide_as_the_width_allows():
    assert [lanes(*case) for case in ((4096, 1), (4096, 8), (96, 3), (1000, 1), (48, 2), (7, 2), (32, 8), (1, 1))] == [
        32, 32, 32, 8, 8, 1, 4, 1,
    ]  # fmt: skip
    assert groups(96, 2) == [(0, 3), (3, 3)]
    assert groups(6, 4) == [(0, 1), (1, 2), (3, 1), (4, 2)]  # 4 does not divide 6


def test_seed_stream_nonzero_and_width_give_unrelated_entries():
    columns = range(2**14)
    tables = [
        sketch_entries(columns, 4096, nonzeros=2, seed=seed, stream=stream) for seed, stream in ((0, 0), (1, 0), (0, 1))
    ]
    flat = [(rows[:, r] % 2048, signs[:, r]) for rows, signs in tables for r in range(2)]
    for k, (rows, signs) in enumerate(flat):
        assert abs(signs.mean()) < 5 / 128
        for others, other_signs in flat[:k]:
            assert abs((signs * other_signs).mean()) < 5 / 128
            # Equal rows at one column in 2,048: whole blocks of 32 agree or not, so 8 of them would be much.
            assert (rows == others).sum() < 8 * 32


def test_signs_are_not_those_of_the_dense_matrix():
    from pyattr.ops import sign_matrix

    dense = sign_matrix([0], range(2**14), 5)[0]
    sparse = sketch_entries(range(2**14), 64, seed=5)[1][:, 0]
    assert abs((dense * sparse).mean()) < 5 / 128


@pytest.mark.parametrize("backend", FAST)
def test_backend_multiplies_by_this_very_matrix(backend):
    for offset, columns, proj_dim, nonzeros in ((0, 300, 64, 1), (2**39 - 200, 200, 96, 3), (4096 - 64, 130, 17, 2)):
        identity = torch.eye(columns, device=testing.device_of(backend))
        out = project(identity, proj_dim, backend, offset, nonzeros=nonzeros, seed=7, stream=11)
        written = matrix(proj_dim, range(offset, offset + columns), nonzeros, seed=7, stream=11)
        assert torch.equal(out.cpu().double(), written.T)


# Values


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_worked_case(backend):
    grads = torch.tensor([[1.0, 2.0, 4.0, 8.0]], device=testing.device_of(backend))
    rows, signs = sketch_entries(range(4), 2)
    expected = [0.0, 0.0]
    for value, row, sign in zip((1, 2, 4, 8), rows[:, 0].tolist(), signs[:, 0].tolist(), strict=True):
        expected[row] += value * sign
    assert sparse_project(grads, 2, backend=backend).tolist() == [expected]
    assert sparse_project(grads, 2, scale=-2.0, backend=backend).tolist() == [[-2 * e for e in expected]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("num_samples", (0, 1, 2, 5, 17))
def test_against_the_definition(backend, dtype, num_samples):
    cases = ((0, 3, 1, 5), (1, 1, 1, 0), (129, 7, 2, 127), (5000, 96, 3, 0), (5000, 32, 8, 4095), (3000, 48, 1, 31))
    for num_columns, proj_dim, nonzeros, offset in cases:
        grads = testing.make_gradients(num_samples, num_columns, dtype, testing.device_of(backend))
        check(backend, grads, proj_dim, nonzeros, offset, 0.25, seed=3, stream=1)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", ((3, 100_001, 5, 1), (2, 20_000, 4096, 4), (20, 33_000, 2048, 1)))
def test_several_chunks(backend, shape):
    num_samples, num_columns, proj_dim, nonzeros = shape
    grads = testing.make_gradients(num_samples, num_columns, device=testing.device_of(backend))
    check(backend, grads, proj_dim, nonzeros, 77, seed=2**32 - 1)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    num_samples=st.integers(0, 6),
    num_columns=st.integers(0, 700),
    proj_dim=st.integers(1, 140),
    nonzeros=st.integers(1, 8),
    offset=st.integers(0, 2**39 - 700),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_offset(backend, num_samples, num_columns, proj_dim, nonzeros, offset, seed):
    grads = testing.make_gradients(num_samples, num_columns, device=testing.device_of(backend), seed=seed)
    check(backend, grads, proj_dim, min(nonzeros, proj_dim), offset, seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    base = testing.make_gradients(12, 1200, device=testing.device_of(backend))
    for grads in (base[::2, ::3], base.T.contiguous().T, base[:, :1].expand(12, 300), base[3:4]):
        same = sparse_project(grads.contiguous(), 64, nonzeros=2, backend=backend)
        assert torch.equal(sparse_project(grads, 64, nonzeros=2, backend=backend), same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_add_up(backend):
    grads = testing.make_gradients(3, 2000, device=testing.device_of(backend))
    whole = sparse_project(grads, 64, nonzeros=3, seed=5, backend=backend)
    parts = sum(
        sparse_project(grads[:, a:b], 64, nonzeros=3, seed=5, column_offset=a, num_columns=2000, backend=backend)
        for a, b in ((0, 1), (1, 700), (700, 701), (701, 2000))
    )
    assert ((whole - parts).abs() <= testing.projection_bound(grads, 1.0, 2 * ERROR)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_values_reach_the_outputs_of_their_column_and_no_other(backend):
    grads = testing.make_gradients(5, 500, device=testing.device_of(backend))
    grads[1, 130], grads[3, 499] = float("nan"), float("inf")
    out = sparse_project(grads, 64, nonzeros=2, backend=backend).cpu()
    rows, signs = sketch_entries([130, 499], 64, nonzeros=2)
    assert out[1].isnan().nonzero().flatten().tolist() == sorted(rows[0].tolist())
    for row, sign in zip(rows[1].tolist(), signs[1].tolist(), strict=True):
        assert out[3, row] == sign * float("inf")
    assert out[3].isinf().sum() == 2 and out[[0, 2, 4]].isfinite().all()


# Same bits


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", ((19, 9000, 300), (4, 70_000, 3), (5, 20_000, 8192)))
def test_bits_do_not_depend_on_batch_or_run(backend, shape):
    num_samples, num_columns, proj_dim = shape
    grads = testing.make_gradients(num_samples, num_columns, device=testing.device_of(backend))
    whole = sparse_project(grads, proj_dim, backend=backend)
    assert torch.equal(sparse_project(grads, proj_dim, backend=backend), whole)
    for sizes in ((1, num_samples - 1), (2, num_samples - 3, 1)):
        pieces = [sparse_project(g, proj_dim, backend=backend) for g in grads.split(sizes)]
        assert torch.equal(torch.cat(pieces), whole)


@CPU
@pytest.mark.parametrize("shape", ((1, 100_000, 7), (2, 40_000, 16), (33, 20_000, 150)))
def test_bits_do_not_depend_on_threads(shape):
    num_samples, num_columns, proj_dim = shape
    grads = testing.make_gradients(num_samples, num_columns)
    torch.set_num_threads(1)
    one = sparse_project(grads, proj_dim, backend="cpu")
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(sparse_project(grads, proj_dim, backend="cpu"), one)


# Variance


def inner_products(g, h, proj_dim, nonzeros, seeds):
    """<Y, Y'> for many seeds, with the scale that keeps it.  # [S]"""
    pair = torch.stack([g, h])
    out = [
        sparse_project(pair, proj_dim, nonzeros=nonzeros, seed=seed, scale=nonzeros**-0.5, backend="reference")
        for seed in range(seeds)
    ]
    return torch.stack([(y[0] * y[1]).sum() for y in out])


@pytest.mark.parametrize("nonzeros", (1, 4))
def test_mean_and_variance_are_those_of_theory_and_no_more_than_sjlts(nonzeros):
    """Over 600 seeds; the sum over pairs of different tiles, beside the sum over all pairs, which is SJLT's."""
    torch.manual_seed(1)
    num_columns, proj_dim, seeds = 400, 128, 600
    g = torch.randn(num_columns, dtype=torch.float64) * 10 ** (-torch.arange(num_columns) / 100.0)  # spiky
    h = g + torch.randn(num_columns, dtype=torch.float64) * 0.1
    pairs = g[:, None] ** 2 * h[None] ** 2 + (g * h)[:, None] * (g * h)[None]
    tile = torch.arange(num_columns) // (proj_dim // nonzeros)
    theory = (pairs * (tile[:, None] != tile[None])).sum() / proj_dim
    sjlt = (pairs.sum() - pairs.diagonal().sum()) / proj_dim
    found = inner_products(g, h, proj_dim, nonzeros, seeds)
    assert abs(found.mean() - g @ h) < 4 * (theory / seeds) ** 0.5
    assert 0.7 < found.var() / theory < 1.4
    assert theory < sjlt


@pytest.mark.parametrize(("proj_dim", "nonzeros"), ((96, 2), (160, 4), (6, 4)))
def test_variance_where_blocks_do_not_come_out_even(proj_dim, nonzeros):
    """Two columns of different tiles meet with the probability that the docstring gives, 1 / D where nonzeros divide D."""
    _, sizes = zip(*groups(proj_dim, nonzeros), strict=True)
    theory = sum(1 / (size * lanes(proj_dim, nonzeros)) for size in sizes) / nonzeros**2
    assert (abs(theory * proj_dim - 1) < 1e-9) == (proj_dim % nonzeros == 0)
    far = [0, 10_000]
    meetings = [sketch_entries(far, proj_dim, nonzeros=nonzeros, seed=seed)[0] for seed in range(3000)]
    share = sum((rows[0] == rows[1]).sum().item() for rows in meetings) / (nonzeros**2 * 3000)
    deviation = (theory / (nonzeros * 3000)) ** 0.5
    assert abs(share - theory) < 5 * deviation


def test_a_layer_within_a_tile_is_kept_exactly():
    """SJLT loses 1.3% of a norm here (standard deviation over seeds); the tiles lose nothing."""
    layer = torch.randn(1, 4096, dtype=torch.float64)
    out = sparse_project(layer, 4096, seed=3, column_offset=2 * 4096, num_columns=10**7, backend="reference")
    torch.testing.assert_close(out.square().sum(), layer.square().sum())


# Derivatives


@pytest.mark.parametrize("backend", BACKENDS)
def test_transpose_is_the_adjoint(backend):
    grads = testing.make_gradients(3, 1000, device=testing.device_of(backend)).requires_grad_()
    cotangent = torch.randn(3, 50, device=grads.device)
    out = project(grads, 50, backend, 9, nonzeros=2, seed=2, scale=0.5)
    (bar,) = torch.autograd.grad(out, grads, cotangent)
    written = matrix(50, range(9, 1009), 2, seed=2)
    torch.testing.assert_close(bar.cpu(), 0.5 * cotangent.cpu() @ written.float(), rtol=1e-5, atol=1e-5)


# A whole run and a part of one, whole calls of the generator and parts, lanes from 32 to 1, a span over several threads' turns.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("proj_dim", "nonzeros", "offset", "columns"),
    [(64, 1, 0, 4096), (64, 2, 4000, 300), (48, 3, 129, 70), (40, 5, 0, 33_000), (6, 4, 2**32 - 7, 99), (7, 7, 5, 1),
     (2048, 8, 2**39 - 500, 500), (1, 1, 3, 40)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_transpose_is_the_matrix_transposed(backend, dtype, proj_dim, nonzeros, offset, columns):
    coefficients = testing.make_gradients(3, proj_dim, dtype, testing.device_of(backend))
    options = {"nonzeros": nonzeros, "seed": 8, "stream": 3, "column_offset": offset, "scale": 0.7, "backend": backend}
    out = sparse_project_transpose(coefficients, columns, **options)
    assert out.shape == (3, columns) and out.dtype == torch.float32 and out.device == coefficients.device
    written = matrix(proj_dim, range(offset, offset + columns), nonzeros, seed=8, stream=3)
    wide = coefficients.cpu().double()
    error = (out.cpu() - 0.7 * wide @ written).abs()
    assert (error <= (nonzeros + 1) * 2.0**-24 * (0.7 * wide.abs() @ written.abs())).all()


@CPU
def test_transpose_takes_any_strides_and_gives_the_same_bits_on_any_number_of_threads():
    torch.set_num_threads(3)
    wide = torch.randn(100, 6).t()[::2]  # [3, 100] of strides (2, 6)
    out = sparse_project_transpose(wide, 70_000, nonzeros=4, seed=2, backend="cpu")
    assert torch.equal(out, sparse_project_transpose(wide.contiguous(), 70_000, nonzeros=4, seed=2, backend="cpu"))
    torch.set_num_threads(1)
    assert torch.equal(out, sparse_project_transpose(wide, 70_000, nonzeros=4, seed=2, backend="cpu"))
    assert sparse_project_transpose(wide, 0).shape == (3, 0)
    assert sparse_project_transpose(wide[:0], 5).shape == (0, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transpose_shows_nan_in_the_columns_that_meet_it_alone(backend):
    coefficients = torch.zeros(1, 64, device=testing.device_of(backend))
    coefficients[0, 5], coefficients[0, 40] = float("nan"), float("inf")
    out = sparse_project_transpose(coefficients, 5000, nonzeros=2, seed=4, backend=backend).cpu()
    rows, _ = sketch_entries(range(5000), 64, nonzeros=2, seed=4)
    meets_nan, meets_inf = (rows == 5).any(1), (rows == 40).any(1)
    assert torch.equal(out[0].isnan(), meets_nan) and torch.equal(out[0].isinf(), meets_inf & ~meets_nan)


def test_transpose_differentiates_to_the_projection():
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def function(c):
        return sparse_project_transpose(c, 40, nonzeros=2, seed=1, column_offset=3, scale=0.3)

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    out = function(x)
    (bar,) = torch.autograd.grad(out, x, out.detach())
    torch.testing.assert_close(bar, project(out.detach(), 6, "reference", 3, nonzeros=2, seed=1, scale=0.3))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(4), 5), {}, "coefficients must have shape [B, D], got [4]"),
        ((torch.ones(1, 4), 5), {"nonzeros": 5}, "coefficients.shape[1] must lie in [5, 2147483648], got 4"),
        ((torch.ones(1, 4), -1), {}, "num_columns must lie in [0, 549755813888], got -1"),
        (
            (torch.ones(1, 4), 9),
            {"column_offset": 2**39 - 8},
            "column_offset must lie in [0, 549755813879], got 549755813880",
        ),
    ],
)  # fmt: skip
def test_transpose_names_the_bad_argument(arguments, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape('sparse_project_transpose: ' + message)}$"):
        sparse_project_transpose(*arguments, **options)


def test_gradcheck_in_both_modes_and_twice():
    grads = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def function(g):
        return project(g, 4, "reference", 30, nonzeros=2, seed=1, scale=0.3)

    assert torch.autograd.gradcheck(function, grads, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda g: function(g).square(), grads, check_fwd_over_rev=True)


def test_forward_mode_is_the_op_itself_and_vmap_the_stack():
    x, x_dot = torch.randn(2, 3, 300)
    y, y_dot = torch.func.jvp(lambda g: sparse_project(g, 20, nonzeros=2, seed=4), (x,), (x_dot,))
    assert torch.equal(y, sparse_project(x, 20, nonzeros=2, seed=4))
    assert torch.equal(y_dot, sparse_project(x_dot, 20, nonzeros=2, seed=4))
    out = torch.func.vmap(lambda g: sparse_project(g, 6))(torch.stack([x, x_dot]))
    assert torch.equal(out, torch.stack([sparse_project(x, 6), sparse_project(x_dot, 6)]))


# Arrays and errors


def test_numpy_in_numpy_out_and_float64_on_the_reference():
    grads = np.random.randn(3, 400).astype(np.float32)
    out = sparse_project(grads, 9)
    assert isinstance(out, np.ndarray) and out.dtype == np.float32
    np.testing.assert_array_equal(out, sparse_project(torch.from_numpy(grads), 9).numpy())
    assert sparse_project(torch.randn(2, 10, dtype=torch.float64), 3).dtype == torch.float64
    with pytest.raises(
        BackendError, match=r"grads is torch\.float64, this backend takes float16, bfloat16 and float32"
    ):
        sparse_project(torch.randn(2, 10, dtype=torch.float64), 3, backend="cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"grads": torch.zeros(3)}, ValueError, "grads must have shape [B, P], got [3]"),
        ({"grads": [[1.0]]}, TypeError, "grads must be a torch tensor, NumPy array or CuPy array, got list"),
        ({"nonzeros": 0}, ValueError, "nonzeros must lie in [1, 8], got 0"),
        ({"nonzeros": 9}, ValueError, "nonzeros must lie in [1, 8], got 9"),
        ({"nonzeros": 5}, ValueError, "proj_dim must lie in [5, 2147483648], got 4"),
        ({"proj_dim": 2**31 + 1}, ValueError, "proj_dim must lie in [1, 2147483648], got 2147483649"),
        ({"column_offset": 5}, ValueError, "num_columns must be given with column_offset, got None"),
        (
            {"column_offset": 5, "num_columns": 7},
            ValueError,
            "num_columns must be at least column_offset + P = 8, got 7",
        ),
        (
            {"column_offset": 2**39, "num_columns": 2**39 + 3},
            ValueError,
            "num_columns must lie in [0, 549755813888], got 549755813891",
        ),
        ({"column_offset": -1, "num_columns": 7}, ValueError, "column_offset must lie in [0, 549755813888], got -1"),
        ({"seed": True}, TypeError, "seed must be an integer, got bool"),
        ({"scale": "1"}, TypeError, "scale must be a real number, got str"),
    ),
)  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    arguments = {"grads": torch.zeros(2, 3), "proj_dim": 4} | change
    with pytest.raises(error) as caught:
        sparse_project(**arguments)
    assert str(caught.value) == f"sparse_project: {message}"


def test_entries_are_checked():
    for bad, message in (
        ({"columns": [2**39]}, r"columns must lie in \[0, 549755813888\), got 549755813888"),
        ({"nonzeros": 9}, r"nonzeros must lie in \[1, 8\], got 9"),
        ({"seed": -1}, r"seed must lie in \[0, 4294967295\], got -1"),
    ):
        with pytest.raises(ValueError, match=f"sketch_entries: {message}"):
            sketch_entries(**{"columns": [1], "proj_dim": 4} | bad)
