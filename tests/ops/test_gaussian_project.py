"""The normal projection: literal entries, every backend against the definition, and the properties it promises."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattr import testing
from pyattr.ops import gaussian_project, normal_matrix, rademacher_project

BACKENDS = testing.usable_backends("gaussian_project")
FAST = [name for name in BACKENDS if name != "reference"]
CPU = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
ENTRY = 2e-6  # of each normal entry
# Relative to sum |g|, beside the entries' own error: |z| < 6.7 times the sums' rounding.
ERROR = {"cpu": 2.0**-19, "reference": 2.0**-22, "cuda": 2.0**-15, "triton": 2.0**-15}


def check(backend, grads, proj_dim, **options):
    out = gaussian_project(grads, proj_dim, backend=backend, **options)
    assert out.shape == (grads.shape[0], proj_dim) and out.dtype == torch.float32 and out.device == grads.device
    offset, scale = options.get("column_offset", 0), options.get("scale", 1.0)
    columns = torch.arange(offset, offset + grads.shape[1])
    normals = normal_matrix(range(proj_dim), columns, options.get("seed", 0), options.get("stream", 0))
    expected = grads.cpu().to(torch.float64) @ normals.T * scale
    bound = testing.projection_bound(grads.cpu(), scale, ENTRY + ERROR[backend]) + expected.abs() * 2.0**-24
    assert ((out.cpu() - expected).abs() <= bound).all()


def test_first_entries_by_hand():
    """Box-Muller on Random123's known answer for counter 0 and key 0."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    expected = []
    for a, b in (words[:2], words[2:]):
        radius = math.sqrt(-2 * math.log((a + 0.5) / 2**32))
        expected += [radius * math.cos(2 * math.pi * b / 2**32), radius * math.sin(2 * math.pi * b / 2**32)]
    torch.testing.assert_close(normal_matrix([0], range(4), 0)[0].tolist(), expected, rtol=1e-14, atol=1e-14)


def test_entries_are_standard_normal():
    entries = normal_matrix(range(128), range(1024), 5).flatten().numpy()
    assert scipy.stats.kstest(entries, "norm").pvalue > 1e-3
    pairs = entries.reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 5 / len(pairs) ** 0.5
    assert abs(np.corrcoef((pairs**2).T)[0, 1]) < 5 / len(pairs) ** 0.5


@pytest.mark.parametrize("backend", FAST)
def test_entries_of_a_backend(backend):
    """Half a million entries within 2e-6 of the float64 definition."""
    for offset, columns, rows in ((0, 257, 2000), (2**34 - 200, 200, 3), (32768 - 64, 130, 17)):
        identity = torch.eye(columns, device=testing.device_of(backend))
        out = gaussian_project(identity, rows, seed=7, stream=11, column_offset=offset, backend=backend)
        entries = normal_matrix(range(rows), range(offset, offset + columns), 7, 11)
        assert (out.cpu() - entries.T).abs().max() <= ENTRY


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("num_samples", (0, 1, 3, 4, 5, 65))
def test_against_the_definition(backend, dtype, num_samples):
    for num_columns, proj_dim, offset in ((0, 3, 5), (1, 1, 0), (129, 7, 127), (1000, 33, 0)):
        grads = testing.make_gradients(num_samples, num_columns, dtype, testing.device_of(backend))
        check(backend, grads, proj_dim, seed=3, stream=1, column_offset=offset, scale=0.25)


@pytest.mark.parametrize("backend", FAST)
def test_several_chunks(backend):
    check(backend, testing.make_gradients(3, 70_001, device=testing.device_of(backend)), 5, column_offset=77)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    num_samples=st.integers(0, 9),
    num_columns=st.integers(0, 300),
    proj_dim=st.integers(1, 40),
    offset=st.integers(0, 2**34 - 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_offset(backend, num_samples, num_columns, proj_dim, offset, seed):
    grads = testing.make_gradients(num_samples, num_columns, device=testing.device_of(backend), seed=seed)
    check(backend, grads, proj_dim, seed=seed, column_offset=offset)


@pytest.mark.parametrize("backend", FAST)
def test_bits_do_not_depend_on_batch_or_run(backend):
    grads = testing.make_gradients(66, 1500, device=testing.device_of(backend))
    whole = gaussian_project(grads, 40, backend=backend)
    assert torch.equal(gaussian_project(grads, 40, backend=backend), whole)
    for sizes in ((1, 65), (4, 5, 57), (63, 3)):
        assert torch.equal(torch.cat([gaussian_project(g, 40, backend=backend) for g in grads.split(sizes)]), whole)


@CPU
def test_bits_do_not_depend_on_threads_or_width():
    for shape, proj_dim in (((5, 70_000), 7), ((5, 1000), 700)):
        grads = testing.make_gradients(*shape)
        torch.set_num_threads(1)
        one = gaussian_project(grads, proj_dim, backend="cpu")
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(gaussian_project(grads, proj_dim, backend="cpu"), one)
        assert torch.equal(gaussian_project(grads, proj_dim // 2, backend="cpu"), one[:, : proj_dim // 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_values_reach_the_whole_row_and_no_other(backend):
    grads = testing.make_gradients(6, 500, device=testing.device_of(backend))
    grads[2, 130], grads[5, 499] = float("nan"), float("inf")
    out = gaussian_project(grads, 40, backend=backend).cpu()
    assert out[2].isnan().all()
    assert torch.equal(out[5], normal_matrix(range(40), [499], 0)[:, 0].sign().float() * float("inf"))
    assert out[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_transpose_is_the_adjoint(backend):
    grads = testing.make_gradients(3, 1000, device=testing.device_of(backend)).requires_grad_()
    cotangent = torch.randn(3, 50, device=grads.device)
    out = gaussian_project(grads, 50, seed=2, column_offset=9, scale=0.5, backend=backend)
    (grads_bar,) = torch.autograd.grad(out, grads, cotangent)
    expected = 0.5 * cotangent.cpu() @ normal_matrix(range(50), range(9, 1009), 2).float()
    torch.testing.assert_close(grads_bar.cpu(), expected, rtol=1e-5, atol=1e-4)


def test_gradcheck_in_both_modes_and_twice():
    grads = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def function(g):
        return gaussian_project(g, 3, seed=1, column_offset=126, scale=0.3, backend="reference")

    assert torch.autograd.gradcheck(function, grads, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda g: function(g).square(), grads)


@pytest.mark.parametrize(("project", "fourth"), ((gaussian_project, 0.0), (rademacher_project, 2.0)))
def test_inner_products_have_the_mean_and_the_variance_of_theory(project, fourth):
    """Rows are independent, so that those of one matrix, a product each, stand for many matrices of one row."""
    x = torch.tensor([[3.0, 1.0, 1.0, 0.5], [2.0, -1.0, 1.0, 0.0]], dtype=torch.float64)
    rows = 1 << 14
    products = project(x, rows, seed=3, scale=0.5, backend="reference").prod(0)  # [rows], scale^2 times
    inner, terms = (x[0] * x[1]).sum(), (x[0] * x[1]).square().sum()
    variance = 0.5**4 * (x.square().sum(1).prod() + inner**2 - fourth * terms)
    assert abs(products.mean() - 0.5**2 * inner) < 4 * (variance / rows) ** 0.5
    # Signs have 0.45 of the normals' variance here, whose sample variance scatters by about 3%.
    assert 0.85 < products.var() / variance < 1.15


def test_library_registration():
    arguments = (torch.randn(3, 200, requires_grad=True), 8, 1, 2, 3, 0.5, "reference")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.pyattr.gaussian_project.default, arguments, test_utils=checks)


def test_column_limit_is_the_counters():
    message = r"gaussian_project: column_offset must lie in \[0, 17179869181\], got 17179869184"
    with pytest.raises(ValueError, match=message):
        gaussian_project(torch.zeros(2, 3), 4, column_offset=2**34)
    with pytest.raises(ValueError, match=r"normal_matrix: columns must lie in \[0, 17179869184\)"):
        normal_matrix([0], [2**34], 0)
