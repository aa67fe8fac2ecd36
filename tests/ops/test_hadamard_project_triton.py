"""The Triton Hadamard projection without a GPU: compiled for one, and run by Triton's interpreter in a child process."""

import pytest
import torch
from triton_without_gpu import compile_for_gpu, interpreted, not_interpreted, run_interpreted

from pyattr.ops import hadamard_project

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@not_interpreted
def test_under_the_interpreter():
    run_interpreted(__file__)


@not_interpreted
@pytest.mark.parametrize("ones", [False, True], ids=["ordinary", "specialised to sizes of 1"])
def test_compiles_for_a_gpu(ones):
    from pyattr.triton_kernels import hadamard_project as kernels

    types = {"grads_ptr": "*bf16", "rows_ptr": "*i64", "partial_ptr": "*fp32"}
    kept = ("bits", "seed", "stream") if ones else None
    for kernel, own in (
        (kernels.rows_kernel, {"BLOCK": 256}),
        (kernels.hadamard_project_kernel, {"BITS": 10, "BLOCK_ROWS": 1024}),
    ):
        compile_for_gpu(kernel, types, own, kept, num_warps=8)


def project(grads, proj_dim, **options):
    return hadamard_project(grads, proj_dim, backend="triton", **options)


def definition(grads, proj_dim, **options):
    return hadamard_project(grads.double(), proj_dim, backend="reference", **options)


def counts(num_samples, num_columns, dtype=torch.float32):
    """Whole numbers, whose sums are exact in any order."""
    return torch.randint(-8, 9, (num_samples, num_columns)).to(dtype)


# (B, P, D, dtype): one element; N small and large enough for both numbers of half-rounds; several tiles of rows, blocks and
# ranges.
CASES = [
    (1, 1, 1, torch.float32),
    *((2, 100, 128, dtype) for dtype in DTYPES),
    (2, 1300, 1500, torch.float32),
    (1, 5000, 3, torch.bfloat16),
]


@interpreted
@pytest.mark.parametrize(("num_samples", "num_columns", "proj_dim", "dtype"), CASES)
def test_values(num_samples, num_columns, proj_dim, dtype):
    grads = counts(num_samples, num_columns, dtype)
    options = {"seed": 2**32 - 1, "stream": 2**31, "scale": -0.5}
    assert torch.equal(project(grads, proj_dim, **options).double(), definition(grads, proj_dim, **options))


@interpreted
def test_rounding_and_bits_of_a_row_do_not_depend_on_the_batch():
    grads = torch.randn(3, 3000)
    whole = project(grads, 50)
    assert ((whole - definition(grads, 50)).abs() <= 2.0**-19 * grads.double().abs().sum(1, keepdim=True)).all()
    assert torch.equal(torch.cat([project(part, 50) for part in grads.split([1, 2])]), whole)


@interpreted
def test_launches_and_ranges_change_nothing_they_should_not(monkeypatch):
    """A launch a sample, as where there are millions of outputs; and one range, whose sums are exact here."""
    from pyattr.triton_kernels import hadamard_project as kernels

    grads = counts(2, 3000)
    expected = project(grads, 40)
    monkeypatch.setattr(kernels, "PARTIALS", 1)
    assert torch.equal(project(grads, 40), expected)
    monkeypatch.setattr(kernels, "MAX_RANGES", 1)
    assert torch.equal(project(grads, 40), expected)


@interpreted
def test_layouts_give_the_same_bits():
    grads = torch.randn(3, 200)
    expected = project(grads, 9)
    columns_apart, transposed = torch.zeros(3, 400)[:, 1::2], torch.zeros(200, 3).T
    for view in (columns_apart, transposed):
        view.copy_(grads)
        assert torch.equal(project(view, 9), expected)
    assert torch.equal(project(grads[:1].expand(3, 200), 9), expected[:1].expand(3, 9))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy says so of inf - inf
def test_infinities_and_nans():
    grads = counts(4, 150)
    grads[0, 130], grads[1, 7], grads[1, 140] = float("inf"), float("inf"), float("-inf")
    grads[2, 149] = float("nan")
    out, expected = project(grads, 11), definition(grads, 11).float()
    assert torch.equal(out.nan_to_num(-12345.0), expected.nan_to_num(-12345.0))
    assert out[:3].isfinite().sum() == 0 and out[3].isfinite().all()


@interpreted
@pytest.mark.parametrize(("num_samples", "num_columns"), [(0, 5), (3, 0)])
def test_empty(num_samples, num_columns):
    assert torch.equal(project(torch.zeros(num_samples, num_columns), 1), torch.zeros(num_samples, 1))
