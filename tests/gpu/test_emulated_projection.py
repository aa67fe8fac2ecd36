"""The CUDA projections' own source on an emulated thread block: no GPU needed.

The emulator (``emulator/``) replaces the two headers that name hardware and the summation limits; the rest is what nvcc
compiles. It refuses reads outside the gradients and misaligned copies, delivers asynchronous copies only when waited for,
fills shared memory with NaN, and cuts tensor-core sums off toward zero.
"""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch

from pyattr.ops import normal_matrix, sign_matrix
from pyattr.ops._projection import DTYPES

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
OPS = ("rademacher_project", "gaussian_project")
# Forward error relative to sum_p |g|. Signs: products are exact, and 32 cut-off additions lose at most 2^-24 of that sum each.
# Normals: an entry is within 2e-6.
ERROR = {"rademacher_project": 2.0**-19, "gaussian_project": 2e-6 + 2.0**-18}
GUARD = 256  # bytes after the workspace that nobody may touch


class Args(ctypes.Structure):
    _fields_ = [
        ("grads", ctypes.c_void_p), ("dtype", ctypes.c_int32),
        ("num_samples", ctypes.c_int64), ("num_columns", ctypes.c_int64),
        ("sample_stride", ctypes.c_int64), ("column_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p), ("proj_dim", ctypes.c_int64),
        ("seed", ctypes.c_uint32), ("stream", ctypes.c_uint32),
        ("column_offset", ctypes.c_int64), ("scale", ctypes.c_float),
    ]  # fmt: skip


class Request(ctypes.Structure):
    _fields_ = [
        ("args", Args), ("workspace", ctypes.c_void_p),
        ("readable_before", ctypes.c_size_t), ("readable_after", ctypes.c_size_t),
        ("shared_limit", ctypes.c_int), ("reverse", ctypes.c_int),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """``project(op, grads, proj_dim, ...)`` -> [B, D], run by the emulator."""
    library_path = tmp_path_factory.mktemp("emulator") / "emulated.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-DPYATTR_WITH_CUDA", "-shared", "-fPIC", f"-I{HERE / 'emulator'}", f"-I{CSRC}"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, str(HERE / "emulator" / "emulated.cpp"), "-o", str(library_path)], check=True)
    library = ctypes.CDLL(str(library_path))

    def run(op, grads, proj_dim, seed=0, stream=0, column_offset=0, scale=1.0, shared_limit=232448, reverse=False):
        out = torch.full((grads.shape[0], proj_dim), float("nan"))
        storage = grads.untyped_storage()
        before = grads.data_ptr() - storage.data_ptr()
        layout = (grads.data_ptr(), DTYPES[grads.dtype], *grads.shape, *grads.stride())
        args = Args(*layout, out.data_ptr(), proj_dim, seed, stream, column_offset, scale)
        request = Request(args, None, before, storage.nbytes() - before, shared_limit, reverse)
        size = getattr(library, f"{op}_workspace")
        size.restype = ctypes.c_size_t
        size = size(ctypes.byref(request))
        workspace = torch.full((size + GUARD,), 0xFF, dtype=torch.uint8)
        request.workspace = workspace.data_ptr()
        kernel = getattr(library, op)
        kernel.restype = ctypes.c_char_p
        assert kernel(ctypes.byref(request)) == b""
        assert (workspace[size:] == 0xFF).all()
        return out

    return run


def matrix(op, proj_dim, num_columns, seed=0, stream=0, column_offset=0):
    entries = sign_matrix if op == "rademacher_project" else normal_matrix
    return entries(range(proj_dim), range(column_offset, column_offset + num_columns), seed, stream).to(torch.float64)


def gradients(num_samples, num_columns, dtype=torch.float32, seed=0):
    return torch.randn(num_samples, num_columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(op, out, grads, proj_dim, scale=1.0, **key):
    expected = grads.to(torch.float64) @ matrix(op, proj_dim, grads.shape[1], **key).T * scale
    bound = ERROR[op] * abs(scale) * grads.to(torch.float64).abs().sum(1, keepdim=True)
    assert ((out - expected).abs() <= bound).all()


# (B, P, D, column_offset): every tile width, a second row tile and a second slab (512 rows here), one block, several chunks
# (384 columns here), ragged first and last blocks, one element.
SHAPES = [
    (1, 1, 1, 0),
    (3, 300, 40, 0),
    (9, 1300, 300, 77),
    (33, 129, 17, 641),
    (2, 5000, 33, 127),
    (65, 256, 550, 128),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_samples", "num_columns", "proj_dim", "column_offset"), SHAPES)
def test_values(project, op, dtype, num_samples, num_columns, proj_dim, column_offset):
    grads = gradients(num_samples, num_columns, dtype)
    out = project(op, grads, proj_dim, 5, 6, column_offset, scale=0.5)
    assert_close(op, out, grads, proj_dim, 0.5, seed=5, stream=6, column_offset=column_offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column_offset", [0, 100, 2**39 - 130])
def test_signs_bit_for_bit(project, dtype, column_offset):
    """The identity's rows come out as the matrix's columns, whatever summation does."""
    out = project("rademacher_project", torch.eye(130).to(dtype), 270, 2**32 - 1, 7, column_offset)
    assert torch.equal(out.double(), matrix("rademacher_project", 270, 130, 2**32 - 1, 7, column_offset).T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column_offset", [0, 3, 2**34 - 130])
def test_normal_entries(project, dtype, column_offset):
    out = project("gaussian_project", torch.eye(130).to(dtype), 40, 2**32 - 1, 7, column_offset)
    assert (out - matrix("gaussian_project", 40, 130, 2**32 - 1, 7, column_offset).T).abs().max() <= 1e-6


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_do_not_depend_on_the_batch(project, op, dtype):
    grads = gradients(42, 700, dtype)
    whole = project(op, grads, 40, column_offset=50)
    parts = [project(op, part, 40, column_offset=50) for part in (grads[:1], grads[1:9], grads[9:])]
    assert torch.equal(whole, torch.cat(parts))
    poisoned = grads.clone()
    poisoned[3, 500] = float("nan")
    rest = [i for i in range(42) if i != 3]
    assert torch.equal(project(op, poisoned, 40, column_offset=50)[rest], whole[rest])


@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_the_device_or_on_which_thread_comes_first(project, op):
    grads = gradients(40, 600)
    whole = project(op, grads, 300)
    assert torch.equal(project(op, grads, 300, shared_limit=101376), whole)  # 99 KB: tiles of 32 samples instead of 64
    assert torch.equal(project(op, grads, 300, reverse=True), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column_offset", [0, 1, 2, 4, 129])
def test_layouts_give_the_same_bits(project, dtype, column_offset):
    """Rows and columns with strides, and starts at every alignment, against a contiguous copy."""
    grads = gradients(5, 400, dtype)
    expected = project("rademacher_project", grads, 33, column_offset=column_offset)
    columns_apart = torch.zeros(5, 800, dtype=dtype)[:, 1::2]
    samples_apart = torch.zeros(10, 407, dtype=dtype)[::2, 7:]
    transposed = torch.zeros(400, 5, dtype=dtype).T
    same = torch.zeros(5, 403, dtype=dtype)[:, 1:401]
    for view in (columns_apart, samples_apart, transposed, same):
        view.copy_(grads)
        assert torch.equal(project("rademacher_project", view, 33, column_offset=column_offset), expected)
    repeated = grads[:1].expand(5, 400)
    assert torch.equal(
        project("rademacher_project", repeated, 33, column_offset=column_offset), expected[:1].expand(5, 33)
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans(project, op, dtype):
    grads = gradients(4, 300, dtype)
    grads[0, 130] = float("inf")
    grads[1, 7], grads[1, 290] = float("inf"), float("-inf")
    grads[2, 299] = float("nan")
    out = project(op, grads, 35)
    entries = matrix(op, 35, 300)
    assert torch.equal(out[0], (float("inf") * entries[:, 130]).float())
    opposed = entries[:, 7] * entries[:, 290] > 0  # the infinities cancel where the entries agree
    assert out[1][opposed].isnan().all() and torch.equal(
        out[1][~opposed], (float("inf") * entries[~opposed, 7]).float()
    )
    assert out[2].isnan().all()
    assert_close(op, out[3:], grads[3:], 35)


@pytest.mark.parametrize("op", OPS)
def test_magnitudes_of_the_whole_range(project, op):
    """A huge number beside tiny ones loses them to rounding alone; the largest float does not overflow in its limbs."""
    for magnitude in (1e-30, 1.0, 3.4e38 / 32):
        grads = gradients(1, 30) * magnitude
        assert_close(op, project(op, grads, 20), grads, 20)
    largest = torch.tensor([[torch.finfo(torch.float32).max]])
    assert torch.equal(project("rademacher_project", largest, 4).abs(), largest.expand(1, 4))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("num_samples", "num_columns"), [(0, 5), (3, 0), (0, 0)])
def test_empty(project, op, num_samples, num_columns):
    out = project(op, torch.zeros(num_samples, num_columns), 7)
    assert torch.equal(out, torch.zeros(num_samples, 7))
