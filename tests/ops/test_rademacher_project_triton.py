"""The Triton sign projection without a GPU: compiled for one, and run by Triton's interpreter in a child process."""

import pytest
import torch
from triton_without_gpu import compile_for_gpu, interpreted, not_interpreted, run_interpreted

from pyattr.ops import rademacher_project, sign_matrix

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ERROR = 2.0**-19  # relative to sum_p |g|: products are exact, sums are float32


@not_interpreted
def test_under_the_interpreter():
    run_interpreted(__file__)


@not_interpreted
@pytest.mark.parametrize("ones", [False, True], ids=["ordinary", "specialised to sizes of 1"])
def test_compiles_for_a_gpu(ones):
    from pyattr.triton_kernels import projection
    from pyattr.triton_kernels import rademacher_project as kernels

    limbs, dot_type = kernels.OPERANDS[torch.bfloat16]
    constants = {"LIMBS": limbs, "DOT_TYPE": dot_type, "BLOCK_ROWS": 128, "BLOCK_SAMPLES": 64}
    types = {"grads_ptr": "*bf16", "partial_ptr": "*fp32", "out_ptr": "*fp32", "scale": "fp32", "column_offset": "i64"}
    kept = ("seed", "stream", "first_row", "first_block") if ones else None
    for kernel, own in ((kernels.rademacher_project_kernel, constants), (projection.reduce_kernel, {"BLOCK": 1024})):
        assert "tf32" not in compile_for_gpu(kernel, types, own, kept)["ptx"]


def project(grads, proj_dim, **options):
    return rademacher_project(grads, proj_dim, backend="triton", **options)


def assert_close(out, grads, seed=0, stream=0, column_offset=0, scale=1.0):
    columns = range(column_offset, column_offset + grads.shape[1])
    signs = sign_matrix(range(out.shape[1]), columns, seed, stream).to(torch.float64)
    bound = ERROR * abs(scale) * grads.to(torch.float64).abs().sum(1, keepdim=True)
    assert ((out - grads.to(torch.float64) @ signs.T * scale).abs() <= bound).all()


# (B, P, D, column_offset, dtype): one element; two tiles of samples; two tiles of rows and a ragged offset; several ranges of
# 8 blocks of 128 columns.
CASES = [
    (1, 1, 1, 0, torch.float32),
    (65, 130, 5, 0, torch.float32),
    *((3, 300, 130, 77, dtype) for dtype in DTYPES),
    (2, 2100, 3, 641, torch.bfloat16),
]


@interpreted
@pytest.mark.parametrize(("num_samples", "num_columns", "proj_dim", "column_offset", "dtype"), CASES)
def test_values(num_samples, num_columns, proj_dim, column_offset, dtype):
    grads = torch.randn(num_samples, num_columns).to(dtype)
    options = {"seed": 2**32 - 1, "stream": 1, "column_offset": column_offset, "scale": 0.5}
    assert_close(project(grads, proj_dim, **options), grads, **options)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column_offset", [0, 100, 2**39 - 64])
def test_signs_bit_for_bit(dtype, column_offset):
    out = project(torch.eye(64).to(dtype), 20, seed=2**31, stream=2**32 - 1, column_offset=column_offset)
    columns = range(column_offset, column_offset + 64)
    assert torch.equal(out, sign_matrix(range(20), columns, 2**31, 2**32 - 1).T)


@interpreted
def test_bits_of_a_row_do_not_depend_on_the_batch():
    """Rows stay in their place of a tile of 64: the interpreter's matmul is NumPy's, which sums by place."""
    grads = torch.randn(66, 70)
    whole = project(grads, 7, column_offset=50)
    for part in (slice(0, 1), slice(0, 40), slice(64, 66)):
        assert torch.equal(project(grads[part], 7, column_offset=50), whole[part])
    assert torch.equal(project(grads * (torch.arange(66) == 9)[:, None], 7, column_offset=50)[9], whole[9])


@interpreted
def test_layouts_give_the_same_bits():
    grads = torch.randn(5, 200)
    expected = project(grads, 9, column_offset=3)
    columns_apart, transposed = torch.zeros(5, 400)[:, 1::2], torch.zeros(200, 5).T
    for view in (columns_apart, transposed):
        view.copy_(grads)
        assert torch.equal(project(view, 9, column_offset=3), expected)
    assert torch.equal(project(grads[:1].expand(5, 200), 9, column_offset=3), expected[:1].expand(5, 9))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy says so of inf - inf
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans(dtype):
    grads = torch.randn(4, 150).to(dtype)
    grads[0, 130] = float("inf")
    grads[1, 7], grads[1, 140] = float("inf"), float("-inf")
    grads[2, 149] = float("nan")
    out, signs = project(grads, 11), sign_matrix(range(11), range(150), 0)
    assert torch.equal(out[0], float("inf") * signs[:, 130])
    opposed = signs[:, 7] == signs[:, 140]
    assert out[1][opposed].isnan().all() and torch.equal(out[1][~opposed], float("inf") * signs[~opposed, 7])
    assert out[2].isnan().all()
    assert_close(out[3:], grads[3:])


@interpreted
def test_float32_is_exact_in_limbs():
    values = torch.tensor([[torch.finfo(torch.float32).max], [1e-30], [3.1415927410125732], [0.0]])
    out = project(values, 3)
    assert torch.equal(out.abs(), values.expand(4, 3))


@interpreted
@pytest.mark.parametrize(("num_samples", "num_columns"), [(0, 5), (3, 0)])
def test_empty(num_samples, num_columns):
    assert torch.equal(project(torch.zeros(num_samples, num_columns), 7), torch.zeros(num_samples, 7))
