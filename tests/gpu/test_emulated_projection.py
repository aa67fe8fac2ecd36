"""The CUDA projections' own source on an emulated thread block: no GPU needed.

The emulator (``emulator/``) replaces the two headers that name hardware and the summation limits; the rest is what nvcc
compiles. It refuses reads outside the gradients and misaligned copies, delivers asynchronous copies only when waited for,
fills shared memory with NaN, and cuts tensor-core sums off toward zero.
"""

import ctypes

import pytest
import torch
from emulation import GUARD, library

from pyattr.ops import hadamard_project, normal_matrix, sign_matrix, sparse_project
from pyattr.ops._projection import DTYPES

OPS = ("rademacher_project", "gaussian_project")
# Forward error relative to sum_p |g|. Signs: products are exact, and 32 cut-off additions lose at most 2^-24 of that sum each.
# Normals: an entry is within 2e-6.
ERROR = {"rademacher_project": 2.0**-19, "gaussian_project": 2e-6 + 2.0**-18}


class Args(ctypes.Structure):
    _fields_ = [
        ("grads", ctypes.c_void_p), ("dtype", ctypes.c_int32),
        ("num_samples", ctypes.c_int64), ("num_columns", ctypes.c_int64),
        ("sample_stride", ctypes.c_int64), ("column_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p), ("proj_dim", ctypes.c_int64),
        ("seed", ctypes.c_uint32), ("stream", ctypes.c_uint32),
        ("column_offset", ctypes.c_int64), ("scale", ctypes.c_float),
    ]  # fmt: skip


class SketchArgs(ctypes.Structure):
    _fields_ = [("base", Args), ("nonzeros", ctypes.c_int32)]


class Request(ctypes.Structure):
    _fields_ = [
        ("args", SketchArgs), ("workspace", ctypes.c_void_p),
        ("readable_before", ctypes.c_size_t), ("readable_after", ctypes.c_size_t),
        ("shared_limit", ctypes.c_int), ("reverse", ctypes.c_int),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """``project(op, grads, proj_dim, ...)`` -> [B, D], run by the emulator."""
    compiled = library("projection", tmp_path_factory.mktemp("emulator"))

    def run(
        op,
        grads,
        proj_dim,
        seed=0,
        stream=0,
        column_offset=0,
        scale=1.0,
        nonzeros=1,
        shared_limit=232448,
        reverse=False,
    ):
        guarded = torch.full((grads.shape[0] * proj_dim + GUARD // 4,), float("nan"))
        out = guarded[: -GUARD // 4].view(grads.shape[0], proj_dim)
        storage = grads.untyped_storage()
        before = grads.data_ptr() - storage.data_ptr()
        layout = (grads.data_ptr(), DTYPES[grads.dtype], *grads.shape, *grads.stride())
        args = Args(*layout, out.data_ptr(), proj_dim, seed, stream, column_offset, scale)
        request = Request(SketchArgs(args, nonzeros), None, before, storage.nbytes() - before, shared_limit, reverse)
        size = getattr(compiled, f"{op}_workspace")
        size.restype = ctypes.c_size_t
        size = size(ctypes.byref(request))
        workspace = torch.full((size + GUARD,), 0xFF, dtype=torch.uint8)
        request.workspace = workspace.data_ptr()
        kernel = getattr(compiled, op)
        kernel.restype = ctypes.c_char_p
        assert kernel(ctypes.byref(request)) == b""
        assert (workspace[size:] == 0xFF).all() and guarded[-GUARD // 4 :].isnan().all()
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


@pytest.mark.parametrize("op", (*OPS, "sparse_project"))
@pytest.mark.parametrize(("num_samples", "num_columns"), [(0, 5), (3, 0), (0, 0)])
def test_empty(project, op, num_samples, num_columns):
    out = project(op, torch.zeros(num_samples, num_columns), 7)
    assert torch.equal(out, torch.zeros(num_samples, 7))


# The sparse projection. Its products are exact, so whole numbers come out exactly, in whatever order they are added.


def counts(num_samples, num_columns, dtype=torch.float32, seed=0):
    values = torch.randint(-9, 10, (num_samples, num_columns), generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def defined(grads, proj_dim, **options):
    return sparse_project(grads.double(), proj_dim, backend="reference", **options).float()


# (B, P, D, nonzeros, column_offset). The emulator has ranges of 2 D columns, at most 3, chunks of 16 tiles, 20 samples a
# launch.
SPARSE_SHAPES = [
    (1, 1, 1, 1, 0),  # one element
    (3, 1200, 1, 1, 5),  # one output: every column its own tile, many chunks
    (2, 700, 45, 1, 2**39 - 700),  # odd width: one lane
    (5, 900, 20, 3, 77),  # 4 lanes; groups of 1 and 2 blocks
    (11, 800, 24, 8, 640),  # 2 lanes, as D leaves fewer blocks than 8 nonzeros otherwise; 8 + 2 + 1 samples
    (1, 40, 32, 1, 17),  # one block of 32 lanes, a tile's edge
    (1, 3000, 64, 2, 129),
    (2, 5000, 96, 3, 31),
    (4, 4500, 288, 4, 0),  # groups of 2 and 3 blocks
    (9, 3000, 544, 1, 1),  # more quads than a warp has
    (13, 2500, 320, 7, 2**39 - 2500),
    (23, 2000, 256, 8, 64),  # two launches
    (3, 9000, 4224, 5, 3),  # more outputs than 4096: half as many samples together; two thread blocks
    (4, 300, 8256, 2, 0),  # fewer columns than a tile
]  # fmt: skip


@pytest.mark.parametrize(("num_samples", "num_columns", "proj_dim", "nonzeros", "column_offset"), SPARSE_SHAPES)
def test_sparse_values(project, num_samples, num_columns, proj_dim, nonzeros, column_offset):
    grads = counts(num_samples, num_columns)
    options = {"seed": 2**32 - 1, "stream": 7, "column_offset": column_offset, "nonzeros": nonzeros, "scale": -0.5}
    expected = defined(grads, proj_dim, num_columns=2**39, **options)
    assert torch.equal(project("sparse_project", grads, proj_dim, **options), expected)
    assert torch.equal(project("sparse_project", grads, proj_dim, reverse=True, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nonzeros", range(1, 9))
@pytest.mark.parametrize("proj_dim", [40, 288])
def test_sparse_values_of_every_type(project, dtype, nonzeros, proj_dim):
    grads = counts(15, 1000, dtype)  # 8, 4, 2, 1 samples together
    expected = defined(grads, proj_dim, nonzeros=nonzeros)
    assert torch.equal(project("sparse_project", grads, proj_dim, nonzeros=nonzeros), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("proj_dim", [45, 288])
def test_sparse_layouts_give_the_same_values(project, dtype, proj_dim):
    grads = counts(5, 1000, dtype)
    expected = defined(grads, proj_dim, nonzeros=2, column_offset=9, num_columns=2000)
    views = (
        torch.zeros(5, 2000, dtype=dtype)[:, 1::2],
        torch.zeros(10, 1007, dtype=dtype)[::2, 7:],
        torch.zeros(1000, 5, dtype=dtype).T,
        torch.zeros(5, 1003, dtype=dtype)[:, 1:1001],
    )
    for view in views:
        view.copy_(grads)
        assert torch.equal(project("sparse_project", view, proj_dim, column_offset=9, nonzeros=2), expected)
    repeated = project("sparse_project", grads[:1].expand(5, 1000), proj_dim, column_offset=9, nonzeros=2)
    assert torch.equal(repeated, expected[:1].expand(5, proj_dim))


@pytest.mark.parametrize("proj_dim", [45, 288, 4224])
def test_sparse_bits_of_a_row_do_not_depend_on_the_batch_or_on_which_thread_comes_first(project, proj_dim):
    grads = gradients(31, 4000)
    whole = project("sparse_project", grads, proj_dim, nonzeros=3)
    assert torch.equal(project("sparse_project", grads, proj_dim, nonzeros=3, reverse=True), whole)
    for sizes in ([1, 2, 4, 8, 16], [7, 24]):
        parts = [project("sparse_project", part, proj_dim, nonzeros=3) for part in grads.split(sizes)]
        assert torch.equal(torch.cat(parts), whole)
    bound = 2.0**-20 * grads.double().abs().sum(1, keepdim=True)
    assert ((whole.double() - sparse_project(grads.double(), proj_dim, nonzeros=3)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("proj_dim", [45, 288])
def test_sparse_infinities_and_nans(project, dtype, proj_dim):
    grads = counts(4, 700, dtype)
    grads[0, 130] = float("inf")
    grads[1, 7], grads[1, 690] = float("inf"), float("-inf")
    grads[2, 699] = float("nan")
    out, expected = (run(grads, nonzeros=3) for run in (
        lambda g, **options: project("sparse_project", g, proj_dim, **options),
        lambda g, **options: defined(g, proj_dim, **options),
    ))  # fmt: skip
    assert torch.equal(out.nan_to_num(-12345.0), expected.nan_to_num(-12345.0))
    assert (out[:2].isinf().sum(1) >= 3).all() and out[2].isnan().sum() == 3 and out[3].isfinite().all()


# The Hadamard projection: blocks of 128 or 256 columns here, at most 3 ranges of them, launches of at most 4,096 partial
# sums. Sums of whole numbers come out exactly, in whatever order they are added.

# (B, P, D): one element; P below, at and beyond a block; several launches; several blocks in every range; all rows.
HADAMARD_SHAPES = [(1, 1, 1), (3, 100, 128), (2, 128, 5), (1, 129, 256), (9, 1300, 700), (2, 3000, 40), (3, 300, 512)]


def transformed(grads, proj_dim, **options):
    return hadamard_project(grads.double(), proj_dim, backend="reference", **options).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_samples", "num_columns", "proj_dim"), HADAMARD_SHAPES)
def test_hadamard_values(project, dtype, num_samples, num_columns, proj_dim):
    grads = counts(num_samples, num_columns, dtype)
    options = {"seed": 2**32 - 1, "stream": 7, "scale": -0.5}
    expected = transformed(grads, proj_dim, **options)
    assert torch.equal(project("hadamard_project", grads, proj_dim, **options), expected)
    assert torch.equal(project("hadamard_project", grads, proj_dim, reverse=True, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hadamard_layouts_and_specials(project, dtype):
    grads = counts(5, 700, dtype)
    grads[0, 130], grads[1, 7], grads[1, 690] = float("inf"), float("inf"), float("-inf")
    grads[2, 699] = float("nan")
    expected = transformed(grads, 45)
    assert expected[:3].isfinite().sum() == 0 and expected[3:].isfinite().all()
    views = (
        torch.zeros(5, 1400, dtype=dtype)[:, 1::2],
        torch.zeros(10, 707, dtype=dtype)[::2, 7:],
        torch.zeros(700, 5, dtype=dtype).T,
        torch.zeros(5, 703, dtype=dtype)[:, 1:701],
    )
    for view in views:
        view.copy_(grads)
        out = project("hadamard_project", view, 45)
        assert torch.equal(out.nan_to_num(-12345.0), expected.nan_to_num(-12345.0))


def test_hadamard_bits_of_a_row_do_not_depend_on_the_batch_or_on_which_thread_comes_first(project):
    grads = gradients(11, 3000)
    whole = project("hadamard_project", grads, 300)
    assert torch.equal(project("hadamard_project", grads, 300, reverse=True), whole)
    parts = [project("hadamard_project", part, 300) for part in grads.split([1, 8, 2])]
    assert torch.equal(torch.cat(parts), whole)
    bound = 2.0**-19 * grads.double().abs().sum(1, keepdim=True)
    assert ((whole.double() - hadamard_project(grads.double(), 300)).abs() <= bound).all()


@pytest.mark.parametrize(("num_samples", "num_columns"), [(0, 5), (3, 0), (0, 0)])
def test_hadamard_empty(project, num_samples, num_columns):
    out = project("hadamard_project", torch.zeros(num_samples, num_columns), 1)
    assert torch.equal(out, torch.zeros(num_samples, 1))
