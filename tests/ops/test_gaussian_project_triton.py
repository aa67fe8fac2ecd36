"""The Triton normal projection without a GPU: compiled for one, and run by Triton's interpreter in a child process."""

import pytest
import torch
from triton_without_gpu import compile_for_gpu, interpreted, not_interpreted, run_interpreted

from pyattr.ops import gaussian_project, normal_matrix

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ERROR = 2e-6 + 2.0**-19  # relative to sum_p |g|: an entry, and float32 sums


@not_interpreted
def test_under_the_interpreter():
    run_interpreted(__file__)


@not_interpreted
@pytest.mark.parametrize("ones", [False, True], ids=["ordinary", "specialised to sizes of 1"])
def test_compiles_for_a_gpu(ones):
    from pyattr.triton_kernels import gaussian_project as kernels

    limbs, dot_type = kernels.OPERANDS[torch.float32]
    constants = {"LIMBS": limbs, "DOT_TYPE": dot_type, "BLOCK_ROWS": 64, "BLOCK_SAMPLES": 64}
    types = {"grads_ptr": "*fp32", "partial_ptr": "*fp32", "column_offset": "i64"}
    kept = ("seed", "stream", "first_row", "first_block") if ones else None
    assert "tf32" not in compile_for_gpu(kernels.gaussian_project_kernel, types, constants, kept)["ptx"]


def project(grads, proj_dim, **options):
    return gaussian_project(grads, proj_dim, backend="triton", **options)


def assert_close(out, grads, seed=0, stream=0, column_offset=0, scale=1.0):
    columns = range(column_offset, column_offset + grads.shape[1])
    normals = normal_matrix(range(out.shape[1]), columns, seed, stream)
    bound = ERROR * abs(scale) * grads.to(torch.float64).abs().sum(1, keepdim=True)
    assert ((out - grads.to(torch.float64) @ normals.T * scale).abs() <= bound).all()


# (B, P, D, column_offset, dtype): one element; two tiles of samples; two tiles of rows and a ragged offset; several ranges of
# 8 blocks of 128 columns.
CASES = [
    (1, 1, 1, 0, torch.float32),
    (65, 130, 5, 0, torch.float32),
    *((3, 150, 70, 77, dtype) for dtype in DTYPES),
    (2, 1100, 3, 641, torch.bfloat16),
]


@interpreted
@pytest.mark.parametrize(("num_samples", "num_columns", "proj_dim", "column_offset", "dtype"), CASES)
def test_values(num_samples, num_columns, proj_dim, column_offset, dtype):
    grads = torch.randn(num_samples, num_columns).to(dtype)
    options = {"seed": 2**32 - 1, "stream": 1, "column_offset": column_offset, "scale": 0.5}
    assert_close(project(grads, proj_dim, **options), grads, **options)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column_offset", [0, 3, 2**34 - 64])
def test_entries(dtype, column_offset):
    out = project(torch.eye(64).to(dtype), 20, seed=2**31, stream=2**32 - 1, column_offset=column_offset)
    expected = normal_matrix(range(20), range(column_offset, column_offset + 64), 2**31, 2**32 - 1).T
    assert (out - expected).abs().max() <= 2e-6


@interpreted
def test_bits_of_a_row_do_not_depend_on_the_batch():
    """Rows stay in their place of a tile of 64: the interpreter's matmul is NumPy's, which sums by place."""
    grads = torch.randn(66, 70)
    whole = project(grads, 7, column_offset=50)
    for part in (slice(0, 1), slice(0, 40), slice(64, 66)):
        assert torch.equal(project(grads[part], 7, column_offset=50), whole[part])
    assert torch.equal(project(grads * (torch.arange(66) == 9)[:, None], 7, column_offset=50)[9], whole[9])


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy says so of inf - inf
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans(dtype):
    grads = torch.randn(4, 150).to(dtype)
    grads[0, 130] = float("inf")
    grads[1, 7], grads[1, 140] = float("inf"), float("-inf")
    grads[2, 149] = float("nan")
    out, entries = project(grads, 11), normal_matrix(range(11), range(150), 0)
    assert torch.equal(out[0], (float("inf") * entries[:, 130]).float())
    opposed = entries[:, 7] * entries[:, 140] > 0
    assert out[1][opposed].isnan().all() and torch.equal(
        out[1][~opposed], (float("inf") * entries[~opposed, 7]).float()
    )
    assert out[2].isnan().all()
    assert_close(out[3:], grads[3:])


@interpreted
@pytest.mark.parametrize(("num_samples", "num_columns"), [(0, 5), (3, 0)])
def test_empty(num_samples, num_columns):
    assert torch.equal(project(torch.zeros(num_samples, num_columns), 7), torch.zeros(num_samples, 7))
