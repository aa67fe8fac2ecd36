"""pyattr.compat.bergson without bergson: literals and digests are bergson 2.5.1's own results."""

import hashlib
import math
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch

from pyattr.compat import bergson
from pyattr.compat.bergson import project_global, random_matrix
from pyattr.ops import normal_matrix, sign_matrix

NAME = "unet.mid_block/single/seed7"
# 4 * project_global(NAME, x, 16, "rademacher") in one block, and in blocks of 128 columns.
ONE_BLOCK = [
    [-55, -17, -65, 65, 79, -57, -23, 91, -1, 39, -53, -5, -39, -27, -113, 33],
    [-6, 112, 132, 30, 72, 84, -88, -92, -64, -16, -66, -16, -8, -36, 48, -14],
]
THREE_BLOCKS = [
    [-39, -39, -7, 17, 3, -11, -53, 71, 25, 61, -17, 29, 21, -65, 41, 9],
    [22, 112, 180, -36, 56, 60, -62, -76, 60, -94, -14, -52, -22, -4, -52, 20],
]
# project_global(NAME, x, 4, "normal", "row_norm").
ROW_NORM = [
    [0.1138833686709404, 1.501834750175476, 6.282159328460693, 3.1561477184295654],
    [9.333389282226562, 6.071295261383057, -5.2252726554870605, 3.2009780406951904],
]
# 4 * project_global(NAME, factors, 16, "rademacher") in blocks of 7 columns of 20.
PER_EXAMPLE = [
    [-12, 4, 14, 24, 14, 22, 10, 28, 34, -6, 28, 6, 0, 0, -18, -20],
    [24, 6, 4, -46, -10, -28, -8, -34, -38, 22, -42, -24, -8, -4, 20, 32],
]
PER_EXAMPLE_WITH_BIAS_AND_DIVISOR = [
    [-15.25, -11.25, 10.75, 28.75, 6.25, 9.75, -5.25, 2.75, 14.75, 2.75, 9.25, 1.75, -1.75, 3.75, 3.25, 1.75],
    [
        15.75,
        1.75,
        5.25,
        -16.25,
        -25.25,
        -22.75,
        15.75,
        -22.25,
        -14.25,
        21.25,
        -37.25,
        -20.75,
        0.75,
        -16.75,
        24.25,
        31.75,
    ],
]
PER_TOKEN_WITH_BIAS_AND_DIVISOR = [
    [-25.75, -9.75, -9.25, 23.75, -12.75, -7.25, -6.25, -3.75, -1.75, -7.25, 5.25, -3.25, 1.25, 7.25, 10.25, 1.75],
    [-5.5, 4.5, 7.0, 7.0, -4.0, 0.0, 13.0, -11.5, -1.5, 3.0, -19.0, -2.0, -2.0, -16.5, 5.0, 10.0],
]


class Factors(NamedTuple):
    """The attributes of bergson's OuterProductGradients."""

    g: torch.Tensor  # [N, S, O] or [N, O]
    a: torch.Tensor  # [N, S, W] or [N, W]
    bias: torch.Tensor | None = None  # [N, O]
    bias_col: torch.Tensor | None = None  # [W]
    divisor: torch.Tensor | None = None  # [O, W]

    def formed(self):  # [N, O * W] float64
        g, a = (x.double() if x.dim() == 3 else x.double()[:, None] for x in (self.g, self.a))
        out = torch.einsum("nso,nsw->now", g, a)
        if self.divisor is not None:
            out = out / self.divisor
        if self.bias is not None:
            out = out + self.bias.double()[:, :, None] * self.bias_col.double()
        return out.flatten(1)


@pytest.fixture
def x():
    i = np.arange(300)
    return torch.tensor(np.stack([i * 7 % 11 - 5, i * 5 % 13 - 6]), dtype=torch.float32)  # [2, 300]


def small_factors():
    g = (torch.arange(30).reshape(2, 3, 5) * 7 % 5 - 2).float()
    a = (torch.arange(24).reshape(2, 3, 4) * 5 % 7 - 3).float()
    bias = (torch.arange(10).reshape(2, 5) * 3 % 5 - 2).float()
    divisor = 2.0 ** (torch.arange(20).reshape(5, 4) * 5 % 3).float()
    return g, a, bias, torch.tensor([1.0, 0.0, 2.0, -1.0]), divisor


def random_factors(shape, heads, bias, divisor, dtype=torch.float32):
    *batch, width = shape
    optional = [torch.randn(batch[0], heads), torch.randn(width)] if bias else [None, None]
    parts = [torch.randn(*batch, heads), torch.randn(*batch, width), *optional]
    parts = [part if part is None else part.to(dtype) for part in parts]
    return Factors(*parts, torch.rand(heads, width) + 0.5 if divisor else None)


@pytest.mark.parametrize(
    "rows, digest",
    [
        (3, "1cb7119959e639a00421d2a51e1fb592960a2167836b6bcc8036b7f8ee427fef"),
        (40, "c17b4bf9a7f2173b3b83a212501c3d5fbcf45dd0df2e51cbfe0d1ed1888740f1"),
    ],
)
def test_signs_are_theirs_bit_for_bit(rows, digest):
    signs = random_matrix(NAME, rows, 1000, "cpu", "rademacher")
    assert hashlib.sha256(signs.numpy().tobytes()).hexdigest() == digest


@pytest.mark.parametrize("rows", [1, 31, 32, 100, 600])
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 700])
@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_entries_are_those_of_the_key(kind, rows, columns):
    seed, stream = 0x89698BD1, 0xB07A8F22  # the MD5 of the name begins d18b6989 228f7ab0
    got = random_matrix(NAME, rows, columns, "cpu", kind)
    expected = (sign_matrix if kind == "rademacher" else normal_matrix)(range(rows), range(columns), seed, stream)
    np.testing.assert_allclose(got, expected, rtol=0, atol=0 if kind == "rademacher" else 2e-6)


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_entries_do_not_depend_on_the_shape(kind):
    large = random_matrix(NAME, 70, 1300, "cpu", kind)
    for rows, columns in [(1, 1), (3, 1001), (31, 512), (32, 513), (70, 129)]:
        assert torch.equal(random_matrix(NAME, rows, columns, "cpu", kind), large[:rows, :columns])


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("budget", [600, 1 << 17, 1 << 20])
def test_entries_do_not_depend_on_the_pieces(kind, budget, monkeypatch):
    expected = random_matrix(NAME, 70, 300, "cpu", kind)
    monkeypatch.setattr(bergson, "WRITTEN_BYTES", budget)
    assert torch.equal(random_matrix(NAME, 70, 300, "cpu", kind), expected)


def test_normals_written_out_on_other_devices(monkeypatch):
    """The path of a GPU, whose kernels round otherwise, gone here with the CPU's tensors."""

    class Elsewhere:
        type = "elsewhere"

    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *a, device=None, **k: arange(*a, **k))
    got = torch.full((600, 1000), torch.nan)
    for rows, columns, entries in bergson._written(NAME, 600, 1000, Elsewhere, "normal"):
        got[rows, columns] = entries.float()
    torch.testing.assert_close(got, random_matrix(NAME, 600, 1000, "cpu", "normal"), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_dtypes_are_roundings_of_float32(kind, dtype):
    got = random_matrix(NAME, 40, 300, "cpu", kind, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, random_matrix(NAME, 40, 300, "cpu", kind).to(dtype))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (64, 0)])
def test_empty_matrices(shape):
    assert random_matrix(NAME, *shape, "cpu", "normal").shape == shape


@pytest.mark.parametrize("columns, expected", [(1 << 23, ONE_BLOCK), (128, THREE_BLOCKS)])
def test_projection_is_theirs_blocks_and_all(x, monkeypatch, columns, expected):
    monkeypatch.setattr(bergson, "BLOCK_ENTRIES", 16 * columns)
    assert (4 * project_global(NAME, x, 16, "rademacher")).tolist() == expected


def test_blocks_have_their_size():
    """2^27 / 2^26 = 2 columns."""
    columns = [list(bergson._blocks(NAME, 1 << 26, 5)), list(bergson._blocks("a", 3, 10))]
    assert columns[0] == [(0, 2, f"{NAME}/0"), (2, 4, f"{NAME}/2"), (4, 5, f"{NAME}/4")]
    assert columns[1] == [(0, 10, "a/0")]


def test_default_is_normal_over_root_m(x):
    R = random_matrix(f"{NAME}/0", 16, 300, "cpu", "normal")
    torch.testing.assert_close(project_global(NAME, x, 16), x @ R.T / 4, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", [4, 40])
def test_row_norm_of_normals(x, width):
    got = project_global(NAME, x, width, "normal", "row_norm")
    np.testing.assert_allclose(got[:, :4], ROW_NORM, rtol=1e-5, atol=1e-5)
    assert torch.equal(project_global(NAME, x, width, "normal", "row_norm"), got)


def test_row_norm_over_blocks(x, monkeypatch):
    monkeypatch.setattr(bergson, "BLOCK_ENTRIES", 40 * 128)
    R = torch.cat([random_matrix(f"{NAME}/{s}", 40, min(128, 300 - s), "cpu", "normal") for s in (0, 128, 256)], dim=1)
    expected = x @ R.T / R.norm(dim=1)
    torch.testing.assert_close(project_global(NAME, x, 40, "normal", "row_norm"), expected, rtol=1e-5, atol=1e-4)


def test_row_norm_of_signs_is_the_root_of_the_columns(x):
    sums = project_global(NAME, x, 16, "rademacher") * 4
    torch.testing.assert_close(project_global(NAME, x, 16, "rademacher", "row_norm"), sums / math.sqrt(300))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_has_the_dtype_of_the_gradients(x, dtype, monkeypatch):
    """Summed over the blocks in float32 and rounded once."""
    monkeypatch.setattr(bergson, "BLOCK_ENTRIES", 16 * 10)
    exact = project_global(NAME, x, 16, "rademacher")
    got = project_global(NAME, x.to(dtype), 16, "rademacher")
    assert torch.equal(got, exact.to(dtype))


def test_factors_are_theirs(monkeypatch):
    monkeypatch.setattr(bergson, "BLOCK_ENTRIES", 16 * 7)
    g, a, bias, column, divisor = small_factors()
    for factors, expected in [
        (Factors(g, a), PER_EXAMPLE),
        (Factors(g, a, bias, column, divisor), PER_EXAMPLE_WITH_BIAS_AND_DIVISOR),
        (Factors(g[:, 0], a[:, 0], bias, column, divisor), PER_TOKEN_WITH_BIAS_AND_DIVISOR),
    ]:
        assert (4 * project_global(NAME, factors, 16, "rademacher")).tolist() == expected


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("divisor", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9), (3, 1, 1), (0, 4, 9), (2, 0, 9)])
@pytest.mark.parametrize(
    "block, tile", [(1 << 27, 1 << 23), (12 * 7, 1 << 23), (12 * 25, 60), (12 * 100, 1), (12 * 9, 27)]
)
def test_factors_are_the_gradients_they_stand_for(monkeypatch, bias, divisor, shape, block, tile):
    """However blocks and tiles cut the rows."""
    monkeypatch.setattr(bergson, "BLOCK_ENTRIES", block)
    monkeypatch.setattr(bergson, "TILE_ENTRIES", tile)
    factors = random_factors(shape, 5, bias, divisor)
    formed = factors.formed().float()
    got = project_global(NAME, factors, 12, "rademacher")
    torch.testing.assert_close(got, project_global(NAME, formed, 12, "rademacher"), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", [1 << 23, 40])
def test_narrow_factors_are_multiplied_in_float32(monkeypatch, dtype, tile):
    monkeypatch.setattr(bergson, "TILE_ENTRIES", tile)
    factors = random_factors((4, 7, 9), 5, True, True, dtype)
    got = project_global(NAME, factors, 12, "rademacher")
    assert got.dtype == dtype
    expected = project_global(NAME, factors.formed().float(), 12, "rademacher")
    torch.testing.assert_close(got.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_no_tile_is_larger_than_the_buffer(monkeypatch):
    """Nothing of the size of the gradients is formed: 3 x 50 x 70 entries, at most 1000 at a time."""
    monkeypatch.setattr(bergson, "TILE_ENTRIES", 1000)
    sizes = []
    project = bergson.OPS["rademacher"]
    monkeypatch.setitem(
        bergson.OPS, "rademacher", lambda tile, *a, **k: sizes.append(tile.numel()) or project(tile, *a, **k)
    )
    project_global(NAME, random_factors((3, 4, 70), 50, False, False), 12, "rademacher")
    assert sum(sizes) == 3 * 50 * 70
    assert max(sizes) <= 1000


@pytest.mark.parametrize(
    "start, stop, width, limit", [(0, 20, 4, 8), (3, 17, 4, 100), (5, 6, 4, 100), (1, 19, 7, 3), (7, 7, 4, 1)]
)
def test_rectangles_cover_their_range_in_order(start, stop, width, limit):
    flat = []
    for rows, columns in bergson._rectangles(start, stop, width, limit):
        part = [
            row * width + column
            for row in range(rows.start, rows.stop)
            for column in range(columns.start, columns.stop)
        ]
        assert 0 < len(part) <= limit
        flat += part
    assert flat == list(range(start, stop))


def test_no_autograd_history():
    factors = Factors(torch.ones(2, 3, requires_grad=True), torch.ones(2, 4))
    assert not project_global(NAME, factors, 3).requires_grad
    assert not project_global(NAME, torch.ones(2, 3, requires_grad=True), 3).requires_grad


def test_empty_gradients():
    assert project_global(NAME, torch.empty(0, 5), 3).shape == (0, 3)
    assert project_global(NAME, torch.empty(2, 0), 3).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: random_matrix(NAME, 2, 2, "cpu", "uniform"),
            ValueError,
            "Unknown projection type: uniform; there are .*",
        ),
        (
            lambda: random_matrix(NAME, 1, 1 << 31, "cpu", "normal"),
            ValueError,
            r".* must be below 2\^31, got \[1, 2147483648\]",
        ),
        (lambda: random_matrix(NAME, -1, 1, "cpu", "normal"), ValueError, "random_matrix: m must lie in .*, got -1"),
        (
            lambda: project_global(NAME, torch.ones(1, 2), 3, "uniform"),
            ValueError,
            "Unknown projection type: uniform; .*",
        ),
        (
            lambda: project_global(NAME, torch.ones(1, 2), 3, "normal", "none"),
            ValueError,
            r"project_global: projection_scale must be one of \['jl', 'row_norm'\], got 'none'",
        ),
        (lambda: project_global(NAME, torch.ones(1, 2), 0), ValueError, "project_global: m must lie in .*, got 0"),
        (
            lambda: project_global(NAME, torch.ones(2), 3),
            ValueError,
            r"project_global: P must have shape \[N, n\], got \[2\]",
        ),
        (lambda: project_global(NAME, [1.0], 3), TypeError, "project_global: P must be a tensor or have .*, got list"),
        (
            lambda: project_global(NAME, Factors(torch.ones(2, 3), torch.ones(3, 3)), 3),
            ValueError,
            r"project_global: P must have g .*, got g \[2, 3\] and a \[3, 3\]",
        ),
        (
            lambda: project_global(NAME, Factors(torch.ones(2, 3), torch.ones(2, 4), divisor=torch.ones(4, 3)), 3),
            ValueError,
            r"project_global: P.divisor must have shape \[3, 4\] for g \[2, 3\] and a \[2, 4\], got \[4, 3\]",
        ),
        (
            lambda: project_global(NAME, Factors(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3)), 3),
            ValueError,
            "project_global: P must have both bias and bias_col, or neither",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        call()


def test_autocast_and_the_default_device_change_nothing():
    """Factors are multiplied in float32 whatever a surrounding training step rounds to; matrices stay on their device."""
    torch.manual_seed(0)
    factors = types.SimpleNamespace(
        g=torch.randn(4, 3, 5), a=torch.randn(4, 3, 7), bias=None, bias_col=None, divisor=None
    )
    expected = project_global(NAME, factors, 40, "rademacher")
    matrix = random_matrix(NAME, 3, 300, "cpu", "normal")
    norms = project_global("norms", factors.g[0], 6, "normal", "row_norm")
    bergson._row_norms.cache_clear()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert torch.equal(project_global(NAME, factors, 40, "rademacher"), expected)
        assert torch.equal(random_matrix(NAME, 3, 300, "cpu", "normal"), matrix)
        assert torch.equal(project_global("norms", factors.g[0], 6, "normal", "row_norm"), norms)
