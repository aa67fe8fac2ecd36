"""The Triton sparse projection without a GPU: compiled for one, and run by Triton's interpreter in a child process."""

import pytest
import torch
from triton_without_gpu import INTERPRETED, compile_for_gpu, interpreted, not_interpreted, run_interpreted

from pyattr.ops import sparse_project

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@not_interpreted
def test_under_the_interpreter():
    run_interpreted(__file__)


@not_interpreted
@pytest.mark.parametrize("width", [1, 8, 32])
@pytest.mark.parametrize("ones", [False, True], ids=["ordinary", "specialised to sizes of 1"])
def test_compiles_for_a_gpu(width, ones):
    from pyattr.triton_kernels import sparse_project as kernels

    own = {"WIDTH": width, "BLOCKS": kernels.BLOCK_OUTPUTS // width, "SAMPLES": 1 if ones else 8, "CHUNK_TILES": 1024}
    types = {"grads_ptr": "*bf16", "sums_ptr": "*fp32", "inverse_ptr": "*i64", "scale": "fp32"}
    types |= {"column_offset": "i64", "range_columns": "i64"}
    compile_for_gpu(
        kernels.sparse_project_kernel, types, own, ("seed", "stream", "chunks", "num_ranges") if ones else None
    )


def project(grads, proj_dim, **options):
    return sparse_project(grads, proj_dim, backend="triton", **options)


def counts(num_samples, num_columns, dtype=torch.float32):
    """Whole numbers: their sums are exact in any order."""
    return torch.randint(-9, 10, (num_samples, num_columns)).to(dtype)


def defined(grads, proj_dim, **options):
    return sparse_project(grads.double(), proj_dim, backend="reference", **options).float()


@pytest.fixture(autouse=True)
def small_numbers(monkeypatch):
    """Tiny problems with many programs, chunks and ranges: the interpreter takes 0.1 s for a tile."""
    if INTERPRETED:
        from pyattr.triton_kernels import sparse_project as kernels

        for name, value in {"BLOCK_OUTPUTS": 128, "CHUNK_TILES": 3, "RANGE_WIDTHS": 2, "MAX_RANGES": 4}.items():
            monkeypatch.setattr(kernels, name, value)


# (B, P, D, nonzeros, column_offset): one element; one output, all tiles of one column; one lane; several lanes and groups of
# two sizes; 32 lanes, several ranges and chunks; many programs along a group; two launches; fewer columns than a tile.
CASES = [
    (1, 1, 1, 1, 0),
    (1, 12, 1, 1, 5),
    (2, 300, 45, 1, 2**39 - 300),
    (5, 25, 20, 3, 77),
    (3, 8, 24, 8, 640),
    (2, 400, 32, 1, 17),
    (3, 350, 96, 3, 31),
    (9, 600, 544, 1, 1),
    (66, 40, 64, 2, 129),
    (1, 30, 544, 2, 0),
]


@interpreted
@pytest.mark.parametrize(("num_samples", "num_columns", "proj_dim", "nonzeros", "column_offset"), CASES)
def test_values(num_samples, num_columns, proj_dim, nonzeros, column_offset):
    grads = counts(num_samples, num_columns)
    options = {"seed": 2**32 - 1, "stream": 7, "nonzeros": nonzeros, "scale": -0.5}
    options |= {"column_offset": column_offset, "num_columns": 2**39}
    assert torch.equal(project(grads, proj_dim, **options), defined(grads, proj_dim, **options))


@interpreted
@pytest.mark.parametrize("nonzeros", (1, 4, 6, 8))
def test_numbers_of_nonzeros(nonzeros):
    grads = counts(2, 70, DTYPES[nonzeros % 3])
    assert torch.equal(project(grads, 288, nonzeros=nonzeros), defined(grads, 288, nonzeros=nonzeros))


@interpreted
@pytest.mark.parametrize(("num_columns", "proj_dim"), [(15, 38), (70, 288)])
def test_bits_of_a_row_do_not_depend_on_the_batch(num_columns, proj_dim):
    grads = torch.randn(11, num_columns)
    whole = project(grads, proj_dim, nonzeros=3)
    for part in (slice(0, 1), slice(7, 11)):
        assert torch.equal(project(grads[part], proj_dim, nonzeros=3), whole[part])
    bound = 2.0**-20 * grads.double().abs().sum(1, keepdim=True)
    assert ((whole.double() - sparse_project(grads.double(), proj_dim, nonzeros=3)).abs() <= bound).all()


@interpreted
def test_layouts_give_the_same_bits():
    grads = torch.randn(5, 60)
    options = {"nonzeros": 2, "column_offset": 9, "num_columns": 400}
    expected = project(grads, 96, **options)
    views = torch.zeros(5, 120)[:, 1::2], torch.zeros(10, 67)[::2, 7:], torch.zeros(60, 5).T
    for view in views:
        view.copy_(grads)
        assert torch.equal(project(view, 96, **options), expected)
    assert torch.equal(project(grads[:1].expand(5, 60), 96, **options), expected[:1].expand(5, 96))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy says so of inf - inf
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans(dtype):
    grads = counts(4, 120, dtype)
    grads[0, 30] = float("inf")
    grads[1, 7], grads[1, 110] = float("inf"), float("-inf")
    grads[2, 119] = float("nan")
    out, expected = project(grads, 96, nonzeros=3), defined(grads, 96, nonzeros=3)
    assert torch.equal(out.nan_to_num(-12345.0), expected.nan_to_num(-12345.0))
    assert out[2].isnan().sum() == 3 and out[3].isfinite().all()


@interpreted
@pytest.mark.parametrize(("num_samples", "num_columns"), [(0, 5), (3, 0)])
def test_empty(num_samples, num_columns):
    assert torch.equal(project(torch.zeros(num_samples, num_columns), 7), torch.zeros(num_samples, 7))
