"""Coordinate sampling: known answers, the gather against the definition, and the properties it promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyattr import testing
from pyattr.backends import BackendError
from pyattr.ops import mask_indices, mask_project
from pyattr.reference.permutation import permutation

BACKENDS = testing.usable_backends("mask_project")


def test_pinned_indices():
    """They must never change: stored features depend on them."""
    assert mask_indices(10, 10).tolist() == PINNED_10
    assert mask_indices(2**62, 2, seed=5, stream=7).tolist() == PINNED_2_TO_62
    assert torch.equal(mask_indices(1000, 7, seed=3), mask_indices(1000, 1000, seed=3)[:7])
    assert mask_indices(1000, 7, seed=3).dtype == torch.int64


PINNED_10 = [3, 1, 9, 6, 4, 5, 7, 2, 8, 0]
PINNED_2_TO_62 = [2606015207400718314, 202712275734121120]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (*testing.DTYPES, torch.float64))
def test_hand_worked_case(backend, dtype):
    grads = torch.arange(20, dtype=dtype, device=testing.device_of(backend)).view(2, 10)
    out = mask_project(grads, 4, scale=-0.5, backend=backend)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.tolist() == [[-1.5, -0.5, -4.5, -3.0], [-6.5, -5.5, -9.5, -8.0]]
    piece = mask_project(grads[:, 3:7], 4, column_offset=3, num_columns=10, backend=backend)
    assert piece.tolist() == [[3, 0, 0, 6], [13, 0, 0, 16]]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(
    num_samples=st.integers(0, 5),
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    proj_dim=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_in_one_piece_or_in_several(backend, num_samples, sizes, proj_dim, seed):
    total = max(sum(sizes), proj_dim)
    sizes = [*sizes, total - sum(sizes)]
    grads = torch.randn(num_samples, total, device=testing.device_of(backend))
    options = {"seed": seed, "stream": 1, "scale": 0.3, "backend": backend}
    whole = mask_project(grads, proj_dim, **options)
    expected = grads[:, mask_indices(total, proj_dim, seed=seed, stream=1).to(grads.device)] * 0.3
    torch.testing.assert_close(whole, expected, rtol=2**-22, atol=0)
    ends = np.cumsum(sizes).tolist()
    pieces = [
        mask_project(grads[:, a:b], proj_dim, column_offset=a, num_columns=total, **options)
        for a, b in zip([0, *ends], ends, strict=False)
    ]
    assert torch.equal(sum(pieces), whole)
    for piece, size in zip(pieces, sizes, strict=True):
        assert piece.shape == (num_samples, proj_dim) and (size > 0 or (piece == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_a_range_far_beyond_memory(backend):
    base = torch.randn(12, 900, device=testing.device_of(backend))
    for grads in (base[::2, ::3], base.T.contiguous().T, base[:, :1].expand(12, 300), base[3:4]):
        same = mask_project(grads.contiguous(), 20, backend=backend)
        assert torch.equal(mask_project(grads, 20, backend=backend), same)
    where = int(mask_indices(2**62, 3, seed=1)[2])
    out = mask_project(base, 3, seed=1, column_offset=where - 5, num_columns=2**62, backend=backend)
    assert torch.equal(out[:, 2], base[:, 5]) and (out[:, :2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_values_stay_where_they_are_kept(backend):
    kept, left_out = mask_indices(50, 10)[3], mask_indices(50, 50)[10]
    grads = torch.ones(2, 50, device=testing.device_of(backend))
    grads[0, kept], grads[1, left_out], grads[1, 0] = float("nan"), float("inf"), 1
    out = mask_project(grads, 10, backend=backend)
    assert out.isnan().nonzero().tolist() == [[0, 3]] and (out[1] == 1).all()
    # What stands in for a coordinate outside the piece is the piece's edge: it must not show.
    edges = torch.full((1, 2), float("inf"), device=grads.device)
    assert not mask_project(edges, 5, column_offset=8, num_columns=1000, backend=backend).isnan().any()


def test_inner_products_have_the_mean_and_the_variance_of_theory():
    """Over 4,000 seeds: E = D/n <x, x'>, Var = D (n - D) / (n (n - 1)) * (sum x^2 x'^2 - <x, x'>^2 / n)."""
    n, proj_dim, seeds = 32, 9, 4000
    x = torch.randn(2, n, dtype=torch.float64)
    terms = x[0] * x[1]
    kept = permutation(
        torch.arange(proj_dim).expand(seeds, -1), n, torch.arange(seeds)[:, None]
    )  # every seed's at once
    found = terms[kept].sum(1)
    projected = mask_project(x, proj_dim, seed=7)
    torch.testing.assert_close((projected[0] * projected[1]).sum(), found[7])
    variance = proj_dim * (n - proj_dim) / (n * (n - 1)) * (terms.square().sum() - terms.sum() ** 2 / n)
    assert abs(found.mean() - proj_dim / n * terms.sum()) < 5 * (variance / seeds) ** 0.5
    # The sample variance of nearly normal numbers scatters by sqrt(2 / seeds) = 2.2%.
    assert 0.89 < found.var() / variance < 1.11


@pytest.mark.parametrize("backend", BACKENDS)
def test_transpose_is_the_adjoint(backend):
    grads = torch.randn(3, 40, device=testing.device_of(backend)).requires_grad_()
    cotangent = torch.randn(3, 30, device=grads.device)
    options = {"seed": 2, "column_offset": 9, "num_columns": 60, "scale": 0.5}
    out = mask_project(grads, 30, backend=backend, **options)
    (bar,) = torch.autograd.grad(out, grads, cotangent)
    matrix = mask_project(torch.eye(40), 30, backend="reference", **options)
    torch.testing.assert_close(bar.cpu(), cotangent.cpu() @ matrix.T)
    half = grads.detach().half().requires_grad_()
    (bar,) = torch.autograd.grad(mask_project(half, 30, backend=backend, **options).sum(), half)
    assert bar.dtype == torch.float16 and torch.equal(bar.cpu().float(), matrix.sum(1).expand(3, 40))


def test_gradcheck_in_both_modes_and_twice():
    grads = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)

    offset = int(mask_indices(200, 3, seed=1)[1]) - 1

    def function(g):
        return mask_project(g, 3, seed=1, column_offset=offset, num_columns=200, scale=0.3)

    assert function(grads)[0, 1] == 0.3 * grads[0, 1]

    assert torch.autograd.gradcheck(function, grads, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda g: function(g).square(), grads, check_fwd_over_rev=True)


def test_vmap():
    x = torch.randn(4, 3, 50)
    expected = torch.stack([mask_project(g, 6) for g in x])
    assert torch.equal(torch.func.vmap(lambda g: mask_project(g, 6))(x), expected)
    assert torch.equal(torch.func.vmap(lambda g: mask_project(g, 6), in_dims=2)(x.movedim(0, 2)), expected)


def test_numpy_in_numpy_out():
    grads = np.random.randn(3, 40).astype(np.float32)
    out = mask_project(grads[:, ::-1], 9)
    assert isinstance(out, np.ndarray) and out.dtype == np.float32
    np.testing.assert_array_equal(out, grads[:, ::-1][:, mask_indices(40, 9).numpy()])


def test_there_is_no_triton_kernel():
    with pytest.raises(BackendError, match="mask_project: backend='triton' cannot run, the op has no such backend"):
        mask_project(torch.zeros(1, 2), 1, backend="triton")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"grads": torch.zeros(3)}, ValueError, "mask_project: grads must have shape [B, P], got [3]"),
        ({"proj_dim": 0}, ValueError, "mask_project: proj_dim must lie in [1, 4611686018427387904], got 0"),
        ({"proj_dim": 4}, ValueError, "mask_project: proj_dim must be at most num_columns = 3, got 4"),
        ({"column_offset": 1}, ValueError, "mask_project: num_columns must be given with column_offset, got None"),
        (
            {"column_offset": 1, "num_columns": 3},
            ValueError,
            "mask_project: num_columns must be at least column_offset + P = 4, got 3",
        ),
        ({"num_columns": 3.0}, TypeError, "mask_project: num_columns must be an integer, got float"),
        ({"seed": -1}, ValueError, "mask_project: seed must lie in [0, 4294967295], got -1"),
        ({"stream": 2**32}, ValueError, "mask_project: stream must lie in [0, 4294967295], got 4294967296"),
        ({"scale": "0.5"}, TypeError, "mask_project: scale must be a real number, got str"),
    ),
)  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    arguments = {"grads": torch.zeros(2, 3), "proj_dim": 2} | change
    with pytest.raises(error) as caught:
        mask_project(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        ((0, 1), ValueError, "mask_indices: num_columns must lie in [1, 4611686018427387904], got 0"),
        ((2**62 + 1, 1), ValueError, f"mask_indices: num_columns must lie in [1, {2**62}], got {2**62 + 1}"),
        ((5, 6), ValueError, "mask_indices: proj_dim must be at most num_columns = 5, got 6"),
        ((5, True), TypeError, "mask_indices: proj_dim must be an integer, got bool"),
    ),
)
def test_errors_of_the_indices(arguments, error, message):
    with pytest.raises(error) as caught:
        mask_indices(*arguments)
    assert str(caught.value) == message
