"""The sign projection: known answers, every backend against the definition, and the properties it promises."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattr import testing
from pyattr.backends import BackendError
from pyattr.ops import normal_matrix, rademacher_project, sign_matrix
from pyattr.reference.philox import philox4x32_10

BACKENDS = testing.usable_backends("rademacher_project")
FAST = [name for name in BACKENDS if name != "reference"]
CPU = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
# Forward error against the float64 definition, relative to sum |g|: 24-bit sums on the CPU, 16-bit limbs on a GPU.
ERROR = {"cpu": 2.0**-21, "reference": 2.0**-23, "cuda": 2.0**-17, "triton": 2.0**-17}


def check(backend, grads, proj_dim, **options):
    """A backend's result against S written out, on awkward and ordinary inputs alike."""
    out = rademacher_project(grads, proj_dim, backend=backend, **options)
    assert out.shape == (grads.shape[0], proj_dim) and out.dtype == torch.float32 and out.device == grads.device
    offset, scale = options.get("column_offset", 0), options.get("scale", 1.0)
    columns = torch.arange(offset, offset + grads.shape[1])
    signs = sign_matrix(range(proj_dim), columns, options.get("seed", 0), options.get("stream", 0)).to(torch.float64)
    expected = grads.cpu().to(torch.float64) @ signs.T * scale
    bound = testing.projection_bound(grads.cpu(), scale, ERROR[backend]) + expected.abs() * 2.0**-24
    assert ((out.cpu() - expected).abs() <= bound).all()


# The matrix


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32 with 10 rounds."""

    def words(counter, key):
        return [int(w) for w in philox4x32_10([torch.tensor(c) for c in counter], key)]

    ones = 0xFFFFFFFF
    assert words((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((ones, ones, ones, ones), (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(pi, (0xA4093822, 0x299F31D0)) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_first_row_of_signs_is_the_known_answer_bit_by_bit():
    """Counter 0, key 0 of the vectors above, lowest bit first."""
    bits = [word >> i & 1 for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8) for i in range(32)]
    assert sign_matrix([0], range(128), 0)[0].tolist() == [2.0 * bit - 1 for bit in bits]


def test_pinned_signs():
    """Rows that must never change: stored features depend on them."""

    def row(j, columns, seed, stream=0):
        return "".join("+" if s > 0 else "-" for s in sign_matrix([j], columns, seed, stream)[0])

    assert row(0, range(32), 0) == "+-+-+-++---+-++++++--+---++--++-"
    assert row(3, range(120, 152), 42) == PINNED_ROW_3
    assert row(2**32 - 1, range(2**39 - 32, 2**39), 2**32 - 1, 2**32 - 1) == PINNED_LAST_ROW


PINNED_ROW_3 = "-++----+++-+-++--++--++--+------"
PINNED_LAST_ROW = "+-++----+----+++-+-+++++-+-+----"


def test_signs_do_not_depend_on_what_is_asked_beside_them():
    whole = sign_matrix(range(5), range(300), 9, 4)
    assert torch.equal(sign_matrix([4, 1], [299, 0, 128, 128], 9, 4), whole[[4, 1]][:, [299, 0, 128, 128]])


def test_seed_and_stream_give_independent_signs():
    tables = [sign_matrix(range(64), range(1024), seed, stream) for seed, stream in ((0, 0), (1, 0), (0, 1), (1, 1))]
    for a in range(4):
        assert abs(tables[a].mean()) < 5 / 256  # five standard deviations of 65,536 signs
        for b in range(a):
            assert abs((tables[a] * tables[b]).mean()) < 5 / 256


@pytest.mark.parametrize("backend", FAST)
def test_backend_multiplies_by_these_very_signs(backend):
    """Projecting unit vectors reads the matrix, across the edge of a Philox block and of a tile."""
    for offset, columns, rows in ((0, 257, 70), (2**39 - 200, 200, 3), (32768 - 64, 130, 17)):
        identity = torch.eye(columns, device=testing.device_of(backend))
        out = rademacher_project(identity, rows, seed=7, stream=11, column_offset=offset, backend=backend)
        signs = sign_matrix(range(rows), range(offset, offset + columns), 7, 11)
        assert torch.equal(out.cpu(), signs.T)


# Values


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_worked_case(backend):
    """Signs of row 0 are + - + - and those of row 1 are read off the pinned matrix: exact in any arithmetic."""
    grads = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.5, 0.0, 0.0, 0.0]], device=testing.device_of(backend))
    signs = sign_matrix(range(2), range(4), 0)
    assert signs[0].tolist() == [1, -1, 1, -1]
    out = rademacher_project(grads, 2, backend=backend).cpu()
    assert out[0, 0] == 1 - 2 + 4 - 8
    assert out[1].tolist() == [0.5 * signs[0, 0], 0.5 * signs[1, 0]]
    assert torch.equal(rademacher_project(grads, 2, scale=-2.0, backend=backend).cpu(), -2 * out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("num_samples", (0, 1, 2, 4, 5, 8, 9, 17, 65))
def test_against_the_definition(backend, dtype, num_samples):
    for num_columns, proj_dim, offset in ((0, 3, 5), (1, 1, 0), (129, 7, 127), (1000, 33, 0)):
        grads = testing.make_gradients(num_samples, num_columns, dtype, testing.device_of(backend))
        check(backend, grads, proj_dim, seed=3, stream=1, column_offset=offset, scale=0.25)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", ((3, 100_001, 5), (2, 1500, 2100), (70, 33_000, 66)))
def test_several_chunks_and_tiles(backend, shape):
    num_samples, num_columns, proj_dim = shape
    grads = testing.make_gradients(num_samples, num_columns, device=testing.device_of(backend))
    check(backend, grads, proj_dim, seed=2**32 - 1, column_offset=77)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    num_samples=st.integers(0, 20),
    num_columns=st.integers(0, 400),
    proj_dim=st.integers(1, 40),
    offset=st.integers(0, 2**39 - 400),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_offset(backend, num_samples, num_columns, proj_dim, offset, seed):
    grads = testing.make_gradients(num_samples, num_columns, device=testing.device_of(backend), seed=seed)
    check(backend, grads, proj_dim, seed=seed, column_offset=offset)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    base = testing.make_gradients(12, 1200, device=testing.device_of(backend))
    for grads in (base[::2, ::3], base.T.contiguous().T, base[:, :1].expand(12, 300), base[3:4]):
        same = rademacher_project(grads.contiguous(), 20, backend=backend)
        assert torch.equal(rademacher_project(grads, 20, backend=backend), same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_add_up(backend):
    grads = testing.make_gradients(3, 2000, device=testing.device_of(backend))
    whole = rademacher_project(grads, 64, seed=5, backend=backend)
    parts = sum(
        rademacher_project(grads[:, a:b], 64, seed=5, column_offset=a, backend=backend)
        for a, b in ((0, 1), (1, 700), (700, 701), (701, 2000))
    )
    assert ((whole - parts).abs() <= testing.projection_bound(grads, 1.0, 2 * ERROR[backend])).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_values_reach_the_whole_row_and_no_other(backend):
    grads = testing.make_gradients(19, 500, device=testing.device_of(backend))
    grads[2, 130], grads[5, 499], grads[7, 0], grads[7, 300] = float("nan"), float("inf"), float("inf"), -float("inf")
    out = rademacher_project(grads, 40, backend=backend).cpu()
    assert out[2].isnan().all()
    signs = sign_matrix(range(40), [499], 0)[:, 0]
    assert torch.equal(out[5], signs * float("inf"))
    same = sign_matrix(range(40), [0, 300], 0)
    assert torch.equal(out[7].isnan(), same[:, 0] == same[:, 1])
    others = [b for b in range(19) if b not in (2, 5, 7)]
    assert out[others].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_every_value_of_a_16_bit_type(backend, dtype):
    """All 65,536 patterns, subnormals and infinities among them, through a one-column matrix."""
    grads = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None].to(testing.device_of(backend))
    out = rademacher_project(grads, 1, backend=backend).cpu()
    expected = grads.cpu().float() * sign_matrix([0], [0], 0)
    finite = expected.isfinite()
    assert torch.equal(out[finite], expected[finite])
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[expected.isinf()], expected[expected.isinf()])


# Same bits


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", ((66, 1500, 300), (9, 70_000, 3)))
def test_bits_do_not_depend_on_batch_or_run(backend, shape):
    num_samples, num_columns, proj_dim = shape
    grads = testing.make_gradients(num_samples, num_columns, device=testing.device_of(backend))
    whole = rademacher_project(grads, proj_dim, backend=backend)
    assert torch.equal(rademacher_project(grads, proj_dim, backend=backend), whole)
    for sizes in ((1, num_samples - 1), (4, 5, num_samples - 9), (num_samples - 3, 3)):
        pieces = [rademacher_project(g, proj_dim, backend=backend) for g in grads.split(sizes)]
        assert torch.equal(torch.cat(pieces), whole)


@CPU
@pytest.mark.parametrize("shape", ((5, 100_000, 7), (70, 100_000, 150), (5, 3000, 700)))
def test_bits_do_not_depend_on_threads_or_width(shape):
    num_samples, num_columns, proj_dim = shape
    grads = testing.make_gradients(num_samples, num_columns)
    torch.set_num_threads(1)
    one = rademacher_project(grads, proj_dim, backend="cpu")
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(rademacher_project(grads, proj_dim, backend="cpu"), one)
    assert torch.equal(rademacher_project(grads, proj_dim // 2, backend="cpu"), one[:, : proj_dim // 2])


def test_norms_are_kept_in_expectation_with_the_variance_of_theory():
    """Over 200 seeds: E |Y|^2 / D = |g|^2, Var = 2 (|g|^4 - sum g^4) / D for independent signs."""
    grads = torch.randn(1, 256, dtype=torch.float64)
    proj_dim, seeds = 32, 200
    norms = torch.stack(
        [
            rademacher_project(grads, proj_dim, seed=s, scale=proj_dim**-0.5, backend="reference").square().sum()
            for s in range(seeds)
        ]
    )
    square, fourth = grads.square().sum(), grads.pow(4).sum()
    deviation = (2 * (square**2 - fourth) / proj_dim).sqrt()
    assert abs(norms.mean() - square) < 4 * deviation / seeds**0.5
    assert 0.75 < norms.std() / deviation < 1.25


# Derivatives


@pytest.mark.parametrize("backend", BACKENDS)
def test_transpose_is_the_adjoint(backend):
    grads = testing.make_gradients(3, 1000, device=testing.device_of(backend)).requires_grad_()
    cotangent = torch.randn(3, 50, device=grads.device)
    out = rademacher_project(grads, 50, seed=2, column_offset=9, scale=0.5, backend=backend)
    (grads_bar,) = torch.autograd.grad(out, grads, cotangent)
    signs = sign_matrix(range(50), range(9, 1009), 2)
    torch.testing.assert_close(grads_bar.cpu(), 0.5 * cotangent.cpu() @ signs, rtol=1e-5, atol=1e-4)


def test_gradcheck_in_both_modes_and_twice():
    grads = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def function(g):  # columns on both sides of a Philox block's edge
        return rademacher_project(g, 3, seed=1, column_offset=126, scale=0.3, backend="reference")

    assert torch.autograd.gradcheck(function, grads, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda g: function(g).square(), grads, check_fwd_over_rev=True)


def test_forward_mode_is_the_op_itself():
    x, x_dot = torch.randn(2, 3, 300)
    y, y_dot = torch.func.jvp(lambda g: rademacher_project(g, 20, seed=4), (x,), (x_dot,))
    assert torch.equal(y, rademacher_project(x, 20, seed=4))
    assert torch.equal(y_dot, rademacher_project(x_dot, 20, seed=4))


def test_vmap():
    x = torch.randn(4, 3, 200)
    out = torch.func.vmap(lambda g: rademacher_project(g, 6))(x)
    assert torch.equal(out, torch.stack([rademacher_project(g, 6) for g in x]))
    out = torch.func.vmap(lambda g: rademacher_project(g, 6), in_dims=2)(x.movedim(0, 2))
    assert torch.equal(out, torch.stack([rademacher_project(g, 6) for g in x]))


def test_reference_and_transpose_hold_little_of_the_matrix(monkeypatch):
    """At most 2^20 entries at a time, however many rows there are; the documentation's bound on memory rests on it."""
    module, entries = sys.modules["pyattr.reference.rademacher_project"], []

    def watched(rows, columns, seed, stream, original=module.sign_matrix):
        entries.append(len(rows) * len(columns))
        return original(rows, columns, seed, stream)

    monkeypatch.setattr(module, "sign_matrix", watched)
    grads = torch.randn(2, 300, dtype=torch.float64, requires_grad=True)
    out = rademacher_project(grads, 20_000, seed=1, column_offset=5, scale=0.5)
    (bar,) = torch.autograd.grad(out, grads, out)
    assert max(entries) <= 2**20 and sum(entries) == 2 * 20_000 * 300
    signs = sign_matrix(range(20_000), range(5, 305), 1).double()
    torch.testing.assert_close(out, 0.5 * grads @ signs.T)
    torch.testing.assert_close(bar, 0.5 * out @ signs)


# Arrays and errors


def test_numpy_in_numpy_out():
    grads = np.random.randn(3, 400).astype(np.float32)
    expected = rademacher_project(torch.from_numpy(grads), 9).numpy()
    read_only = grads.copy()
    read_only.setflags(write=False)
    packed = np.zeros(grads.shape, dtype=[("label", np.int8), ("grads", np.float32)])
    packed["grads"] = grads
    for array in (grads, read_only, np.asfortranarray(grads), grads[::-1][::-1], packed["grads"]):
        out = rademacher_project(array, 9)
        assert isinstance(out, np.ndarray) and out.dtype == np.float32
        np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(rademacher_project(grads[:, ::-1], 9), rademacher_project(grads[:, ::-1].copy(), 9))


def test_float64_stays_float64_on_the_reference():
    out = rademacher_project(torch.randn(2, 10, dtype=torch.float64), 3)
    assert out.dtype == torch.float64
    with pytest.raises(
        BackendError, match=r"grads is torch\.float64, this backend takes float16, bfloat16 and float32"
    ):
        rademacher_project(torch.randn(2, 10, dtype=torch.float64), 3, backend="cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"grads": torch.zeros(3)}, ValueError, "rademacher_project: grads must have shape [B, P], got [3]"),
        (
            {"grads": torch.eye(3).to_sparse()},
            TypeError,
            "rademacher_project: grads must be a dense (strided) tensor, got layout torch.sparse_coo",
        ),
        (
            {"grads": torch.zeros(1, 2, dtype=torch.int64)},
            TypeError,
            "rademacher_project: grads must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (
            {"grads": np.zeros((1, 2), dtype=">f4")},
            TypeError,
            "rademacher_project: grads must be in this machine's byte order, got dtype >f4",
        ),
        (
            {"grads": np.ma.masked_array([[1.0, 2.0]], [[True, False]])},
            TypeError,
            "rademacher_project: grads must not be a masked array: fill it first, as the mask would be lost",
        ),
        (
            {"grads": [[1.0]]},
            TypeError,
            "rademacher_project: grads must be a torch tensor, NumPy array or CuPy array, got list",
        ),
        ({"proj_dim": 0}, ValueError, "rademacher_project: proj_dim must lie in [1, 4294967296], got 0"),
        ({"proj_dim": 2.5}, TypeError, "rademacher_project: proj_dim must be an integer, got float"),
        ({"seed": -1}, ValueError, "rademacher_project: seed must lie in [0, 4294967295], got -1"),
        ({"stream": 2**32}, ValueError, "rademacher_project: stream must lie in [0, 4294967295], got 4294967296"),
        (
            {"column_offset": 2**39 - 1},
            ValueError,
            "rademacher_project: column_offset must lie in [0, 549755813885], got 549755813887",
        ),
        ({"seed": True}, TypeError, "rademacher_project: seed must be an integer, got bool"),
        ({"scale": None}, TypeError, "rademacher_project: scale must be a real number, got NoneType"),
        ({"scale": "0.5"}, TypeError, "rademacher_project: scale must be a real number, got str"),
        *(
            (
                {"scale": scale},
                ValueError,
                f"rademacher_project: scale must be 0 or of magnitude 2^-126 to 2^128 (float32), got {shown}",
            )
            for scale, shown in ((1e39, "1e+39"), (-(10**400), "inf"), (float("nan"), "nan"), (1e-40, "1e-40"))
        ),
        (
            {"backend": "fast"},
            ValueError,
            "rademacher_project: backend must be one of cuda, triton, cpu, reference, got 'fast'",
        ),
    ),
)  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    arguments = {"grads": torch.zeros(2, 3), "proj_dim": 4} | change
    with pytest.raises(error) as caught:
        rademacher_project(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("matrix", (sign_matrix, normal_matrix))
@pytest.mark.parametrize("argument", ("rows", "columns"))
def test_matrix_indices_are_checked(matrix, argument):
    arguments = {"rows": [3], "columns": [5], "seed": 0}
    name = f"{matrix.__name__}: {argument} must"
    limit = 2**32 if argument == "rows" else {sign_matrix: 2**39, normal_matrix: 2**34}[matrix]
    for bad, got in (
        ([-1], "-1..-1"),
        ([0, limit], f"0..{limit}"),
        ([2**70], f"{2**70}..{2**70}"),
        (torch.tensor([limit]), f"{limit}..{limit}"),
        (np.array([2**64 - 1], dtype=np.uint64), "numbers from 2^63 on"),
    ):
        with pytest.raises(ValueError) as caught:
            matrix(**arguments | {argument: bad})
        assert str(caught.value) == f"{name} lie in [0, {limit}), got {got}"
    complex_numbers = torch.zeros(2, dtype=torch.complex64)
    for bad in (
        [0.5],
        [True],
        "12",
        (i for i in range(3)),
        [[1, 2]],
        torch.zeros(2),
        complex_numbers,
        torch.arange(2)[None],
    ):
        with pytest.raises(TypeError, match=name):
            matrix(**arguments | {argument: bad})
    whole = matrix(**arguments | {argument: range(4)})
    for good in ([3, 1], np.array([1, 3])[::-1], *(torch.tensor([3, 1], dtype=d) for d in INTEGERS)):
        expected = whole[[3, 1]] if argument == "rows" else whole[:, [3, 1]]
        assert torch.equal(matrix(**arguments | {argument: good}), expected)
    assert matrix(**arguments | {argument: []}).numel() == 0


INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("matrix", (sign_matrix, normal_matrix))
def test_matrix_keys_are_checked(matrix):
    assert torch.equal(matrix([0], [1], np.int64(3), torch.tensor(4)), matrix([0], [1], 3, 4))
    for argument in ("seed", "stream"):
        key = {"seed": 0, "stream": 0}
        with pytest.raises(ValueError, match=rf"{matrix.__name__}: {argument} must lie in \[0, 4294967295\], got -1"):
            matrix([0], [0], **key | {argument: -1})
        with pytest.raises(TypeError, match=f"{matrix.__name__}: {argument} must be an integer, got bool"):
            matrix([0], [0], **key | {argument: True})


def test_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("PYATTR_BACKEND", "reference")
    grads = torch.randn(2, 50)
    assert torch.equal(rademacher_project(grads, 4), rademacher_project(grads, 4, backend="reference"))
    monkeypatch.setenv("PYATTR_BACKEND", "gpu")
    with pytest.raises(ValueError, match="PYATTR_BACKEND must be one of cuda, triton, cpu, reference, got 'gpu'"):
        rademacher_project(grads, 4)
