"""The CUDA patch kernels' own source on an emulated thread block: no GPU needed.

See ``test_emulated_projection.py`` for the emulator. Limits are small here, so that a few images take several launches, tiles
of distances lie in and outside shared memory, and thread blocks take several tiles. The rest of the op, its parts of the
positions and the join of the images, is the op's own.
"""

import ctypes
import importlib

import pytest
import torch
from emulation import GUARD, extent, library

from pyattr.ops import patch_mean, patch_topk
from pyattr.ops._patches import Part, address_and_sizes, check_problem
from pyattr.reference.patches import patches

topk_op, mean_op = (importlib.import_module(f"pyattr.ops.{name}") for name in ("patch_topk", "patch_mean"))


class PatchArgs(ctypes.Structure):
    _fields_ = [
        ("query", ctypes.c_void_p), ("bank", ctypes.c_void_p), ("pixel", ctypes.c_int32),
        ("bank_strides", ctypes.c_int64 * 4), ("num_images", ctypes.c_int64), ("channels", ctypes.c_int64),
        ("query_height", ctypes.c_int64), ("query_width", ctypes.c_int64),
        ("height", ctypes.c_int64), ("width", ctypes.c_int64), ("patch_size", ctypes.c_int64),
        ("border", ctypes.c_int32), ("lowres", ctypes.c_bool), ("scale", ctypes.c_double), ("inverse", ctypes.c_double),
        ("row_begin", ctypes.c_int64), ("row_end", ctypes.c_int64),
        ("column_begin", ctypes.c_int64), ("column_end", ctypes.c_int64), ("stats_stride", ctypes.c_int64),
    ]  # fmt: skip


class TopkArgs(ctypes.Structure):
    _fields_ = [
        ("base", PatchArgs), ("k", ctypes.c_int64),
        ("minima", ctypes.c_void_p), ("sums", ctypes.c_void_p), ("tops", ctypes.c_void_p), ("nearest", ctypes.c_void_p),
    ]  # fmt: skip


class MeanArgs(ctypes.Structure):
    _fields_ = [
        ("base", PatchArgs), ("minima", ctypes.c_void_p), ("sums", ctypes.c_void_p), ("pixels", ctypes.c_void_p),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The two ops with the emulator as their backend: ``emulated.patch_topk(...)``, ``emulated.patch_mean(...)``."""
    return Emulated(library("patches", tmp_path_factory.mktemp("emulator")))


class Emulated:
    def __init__(self, compiled):
        self.compiled = compiled

    def _run(self, name, args, images, reverse):
        size = getattr(self.compiled, f"{name}_workspace")
        size.restype = ctypes.c_size_t
        size = size(ctypes.byref(args))
        workspace = torch.full((size + GUARD,), 0xFF, dtype=torch.uint8)
        kernel = getattr(self.compiled, name)
        kernel.restype = ctypes.c_char_p
        bank_bytes = ctypes.c_size_t(extent(images))
        said = kernel(ctypes.byref(args), ctypes.c_void_p(workspace.data_ptr()), bank_bytes, int(reverse))
        assert said == b""
        assert (workspace[size:] == 0xFF).all()

    @staticmethod
    def _base(query, images, problem, sigma, part, stride):
        given = address_and_sizes(query, images, problem, sigma, part)
        query_address, address, pixel, strides, shape, query_size, *rest, part = given
        strides, (num_images, channels, *size) = (ctypes.c_int64 * 4)(*strides), shape
        sizes = (num_images, channels, *query_size, *size)
        return PatchArgs(query_address, address, pixel, strides, *sizes, *rest, *part, stride)

    def topk_statistics(self, problem, k, query, images, sigma, part, out, reverse=False):
        base = self._base(query, images, problem, sigma, part, out[0].stride(0))
        args = TopkArgs(base, k, *(0 if a is None else a.data_ptr() for a in out))
        self._run("patch_topk", args, images, reverse)

    def patch_topk(
        self,
        queries,
        bank,
        *,
        patch_size,
        k,
        sigma,
        scale=1.0,
        border="class",
        lowres=False,
        reverse=False,
        winners=True,
    ):
        def statistics(*arguments):
            self.topk_statistics(*arguments, reverse=reverse)

        borders = ("class", "zero")
        problem, _ = check_problem("patch_topk", queries, bank, patch_size, sigma, scale, border, lowres, borders)
        return topk_op._run_compiled(statistics, topk_op._join)(problem, k, winners)

    def patch_mean(self, queries, bank, *, patch_size, sigma, scale=1.0, border="class", reverse=False):
        def statistics(problem, query, images, sigma, part, out):
            base = self._base(query, images, problem, sigma, part, len(images))
            self._run("patch_mean", MeanArgs(base, *(a.data_ptr() for a in out)), images, reverse)

        borders = ("class", "zero", "inside")
        problem, _ = check_problem("patch_mean", queries, bank, patch_size, sigma, scale, border, False, borders)
        return mean_op._run_compiled(statistics, mean_op._join)(problem)


def bank_of(dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return pixels if dtype == torch.uint8 else (pixels.double() / 127.5 - 1).to(dtype)


def queries_of(bank, count, sigma, scale=1.0, seed=1):
    """Images of the bank, and one between two of them, with noise."""
    generator = torch.Generator().manual_seed(seed)
    images = bank.double() / 127.5 - 1 if bank.dtype == torch.uint8 else bank.double()
    clean = images[torch.arange(count) % len(images)]
    clean = torch.cat([clean[:-1], clean[-1:] / 2 + images[:1] / 2])
    return (scale * clean + sigma * torch.randn(clean.shape, generator=generator).double()).float()


def compare(emulated, queries, bank, *, tolerance=2e-5, **options):
    """Against the definition in float64; returns what the emulator gave."""
    found = emulated.patch_topk(queries, bank, **options)
    expected = patch_topk(queries.double(), bank, return_winners=True, backend="reference", **options)
    weights, log_normaliser, images, positions, shares = found
    grid = expected.log_normaliser.shape
    torch.testing.assert_close(weights, expected.weights, rtol=tolerance, atol=tolerance * grid[1] * grid[2])
    torch.testing.assert_close(log_normaliser.view(grid), expected.log_normaliser, rtol=3e-7, atol=tolerance)
    torch.testing.assert_close(shares.view(grid), expected.winners.weights, rtol=tolerance, atol=tolerance)
    assert torch.equal(images.view(grid), expected.winners.images)
    width = grid[2]
    assert torch.equal(
        torch.stack([positions // width, positions % width], -1).view(*grid, 2), expected.winners.positions
    )
    return found


# (C, H, W, p): one pixel; interior, edges and corners; odd and even; no interior along one axis; a patch larger than the image.
SIZES = [(1, 1, 1, 1), (3, 6, 7, 3), (2, 9, 5, 4), (1, 8, 3, 5), (2, 3, 4, 7), (5, 4, 4, 2)]


@pytest.mark.parametrize("border", ["class", "zero"])
@pytest.mark.parametrize(("channels", "height", "width", "patch_size"), SIZES)
def test_values(emulated, border, channels, height, width, patch_size):
    bank = bank_of(torch.uint8, 4, channels, height, width)
    queries = queries_of(bank, 1, 0.5, 0.8)
    compare(emulated, queries, bank, patch_size=patch_size, k=3, sigma=0.5, scale=0.8, border=border)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_type_and_layout(emulated, dtype):
    bank = bank_of(dtype, 4, 2, 6, 6)
    queries = queries_of(bank, 1, 0.3)
    options = {"patch_size": 3, "k": 2, "sigma": 0.4}
    expected = compare(emulated, queries, bank, **options)
    apart = torch.zeros(4, 6, 12, 4, dtype=dtype)[:, :, ::2, 1:3].permute(0, 3, 1, 2)
    apart.copy_(bank)
    for same in (apart, [bank[:1], bank[1:1], bank[1:]]):
        found = emulated.patch_topk(queries, same, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("k", [1, 2, 7, 24, 25, 1000])
@pytest.mark.parametrize("sigma", [0.02, 0.3, 30.0])
def test_top_k_of_few_and_of_many_terms(emulated, k, sigma):
    bank = bank_of(torch.uint8, 2, 1, 6, 6)
    queries = queries_of(bank, 1, min(sigma, 1.0))
    found = compare(emulated, queries, bank, patch_size=3, k=k, sigma=sigma, border="zero")
    if k >= 36:
        torch.testing.assert_close(found[0].sum(1), torch.tensor([36.0]).double(), rtol=1e-6, atol=0)


def test_ties_count_as_often_as_they_fit(emulated):
    """Constant images: every window of the interior is as near, so that k of V take k / V of their image's share."""
    bank = torch.full((2, 1, 6, 6), 100, dtype=torch.uint8)
    queries = torch.zeros(1, 1, 6, 6)
    for k in (1, 5, 16):
        found = compare(emulated, queries, bank, patch_size=3, k=k, sigma=0.2)
        # 16 interior windows match 2 * 16; those on an edge 2 * 4, the corners 2.
        expected = 16 * k / 32 + 16 * min(k, 4) / 8 + 4 / 2
        torch.testing.assert_close(found[0], torch.full((1, 2), expected).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("border", ["class", "zero"])
@pytest.mark.parametrize("size", [5, 15, 20, 30, 33])
def test_rows_of_every_length(emulated, border, size):
    """A lane holds 1, 8, 24 or 32 values, or reads them again for every look. Only a few query windows are asked for."""
    bank = bank_of(torch.uint8, 2, 1, size, size)
    query = queries_of(bank, 1, 0.05)
    problem, _ = check_problem("patch_topk", query, bank, 1, 0.05, 1.0, border, False, ("class", "zero"))
    out = [torch.empty(6, 2) for _ in range(3)] + [torch.empty(6, 2, dtype=torch.int32)]
    emulated.topk_statistics(problem, 9, query[0], bank, 0.05, Part(2, 4, size - 3, size), out)
    images = bank.double().flatten(1) / 127.5 - 1
    d = (query.double()[0, 0, 2:4, -3:].reshape(6, 1, 1) - images).square()  # [6, 2, size^2]
    terms = torch.exp(-(d - d.min(2, keepdim=True).values) / (2 * 0.05**2)).sort(2, descending=True).values
    torch.testing.assert_close(out[0], d.min(2).values.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(out[1], terms.sum(2).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(out[2], terms[:, :, :9].sum(2).float(), rtol=1e-4, atol=0)
    assert torch.equal(out[3].long(), d.argmin(2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("patch_size", "lowres", "size"), [(7, False, 9), (6, True, 9), (5, False, 24)], ids=["plain", "blocks", "larger"]
)
@pytest.mark.parametrize(("variance", "bound"), [(2.2e-4, 2e-3), (2.2e-3, 3e-4), (0.105, 2e-5), (0.92, 2e-5)])
def test_exponents_are_as_exact_as_differences_in_float32(emulated, dtype, patch_size, lowres, size, variance, bound):
    """d / (2 sigma^2) of the patches within 25 of the nearest, on tensor cores (8-bit images) and on CUDA cores."""
    shift = torch.linspace(-0.6, 0.6, 3)[:, None, None, None]
    ramp = torch.linspace(-0.3, 0.3, size)[:, None] * torch.linspace(-1.0, 1.0, size)[None, :]
    grain = 0.05 * torch.randn(3, 3, size, size)
    pixels = (((shift + ramp + grain).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    bank = pixels if dtype == torch.uint8 else pixels.float() / 127.5 - 1
    scale, sigma = (1 - variance) ** 0.5, variance**0.5
    query = queries_of(bank, 1, sigma, scale)
    borders = ("class", "zero")
    problem, _ = check_problem("patch_topk", query, bank, patch_size, sigma, scale, "class", lowres, borders)
    first, count = (
        (patch_size - 1) // 2,
        size - patch_size + 1,
    )  # windows that no border cuts, of which two rows are asked for
    out = [torch.empty(2 * count, 3) for _ in range(3)]
    rows = Part(first, first + 2, first, first + count)
    emulated.topk_statistics(problem, 1, query[0], bank, sigma, rows, [*out, None])
    images = bank.double() / 127.5 - 1 if dtype == torch.uint8 else bank.double()
    windows, others = (patches(x, patch_size, "inside", lowres) for x in (query.double(), scale * images))
    near, sums = torch.empty(2 * count, 3).double(), torch.empty(2 * count, 3).double()
    for u, window in enumerate(windows[0, : 2 * count]):
        exponents = (window - others).square().sum(2) / (2 * variance)  # [3, V]
        near[u] = exponents.min(1).values
        sums[u] = torch.exp(near[u, :, None] - exponents).sum(1)
    close = near < near.min(1, keepdim=True).values + 25
    assert ((out[0].double() / (2 * variance) - near).abs()[close] <= bound).all()
    assert ((out[1].double() / sums).log().abs()[close] <= bound).all()


def test_pixels_beyond_24_bits_are_left_to_differences(emulated):
    """Beside one pixel of 1e9 three bytes cannot hold the others; so too with a scale of 0."""
    bank = bank_of(torch.uint8, 3, 2, 6, 6)
    queries = queries_of(bank, 1, 0.3)
    compare(emulated, queries, bank, patch_size=3, k=2, sigma=0.4, scale=0.0)
    queries[0, 0, 0, 0] = 1e9
    found = emulated.patch_topk(queries, bank, patch_size=3, k=2, sigma=0.4)
    expected = patch_topk(queries.double(), bank, patch_size=3, k=2, sigma=0.4, backend="reference")
    away = torch.ones(6, 6, dtype=torch.bool)
    away[:2, :2] = False
    got = found[1].view(6, 6)[away]
    torch.testing.assert_close(got, expected.log_normaliser[0][away], rtol=3e-7, atol=2e-5)


@pytest.mark.parametrize("border", ["class", "zero"])
@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_block_sums(emulated, border, patch_size):
    bank = bank_of(torch.uint8, 3, 2, 7, 6)
    queries = queries_of(bank, 2, 0.3, 0.9)
    compare(emulated, queries, bank, patch_size=patch_size, k=3, sigma=0.4, scale=0.9, border=border, lowres=True)


def test_bits_do_not_depend_on_which_thread_comes_first_nor_on_the_parts(emulated, monkeypatch):
    bank = bank_of(torch.uint8, 3, 2, 7, 8)
    queries = queries_of(bank, 1, 0.3)
    options = {"patch_size": 3, "k": 4, "sigma": 0.3}
    whole = emulated.patch_topk(queries, bank, **options)
    assert all(map(torch.equal, emulated.patch_topk(queries, bank, reverse=True, **options), whole))
    monkeypatch.setattr("pyattr.ops._patches.STATISTICS_BYTES", 1)
    monkeypatch.setattr("pyattr.ops._patches.FEWEST_POSITIONS", 11)
    parts = emulated.patch_topk(queries, bank, **options)
    assert all(map(torch.equal, parts[1:], whole[1:]))
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("border", ["class", "zero", "inside"])
@pytest.mark.parametrize(("channels", "patch_size"), [(1, 1), (3, 3), (6, 2)])
def test_mean(emulated, border, channels, patch_size):
    bank = bank_of(torch.uint8, 3, channels, 5, 6)
    queries = queries_of(bank, 2, 0.5, 0.8)
    options = {"patch_size": patch_size, "sigma": [0.2, 0.5], "scale": 0.8, "border": border}
    mean, log_normaliser = emulated.patch_mean(queries, bank, **options)
    expected = patch_mean(queries.double(), bank, backend="reference", **options)
    torch.testing.assert_close(mean.view_as(expected.mean), expected.mean, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        log_normaliser.view_as(expected.log_normaliser), expected.log_normaliser, rtol=3e-7, atol=2e-5
    )
    assert torch.equal(emulated.patch_mean(queries, bank, reverse=True, **options)[0], mean)


def test_mean_of_windows_wholly_inside_images_of_another_size(emulated):
    bank, queries = bank_of(torch.float32, 4, 2, 5, 8), torch.randn(1, 2, 9, 4)
    options = {"patch_size": 3, "sigma": 0.7, "border": "inside"}
    mean, _ = emulated.patch_mean(queries, bank, **options)
    expected = patch_mean(queries.double(), bank, backend="reference", **options).mean
    torch.testing.assert_close(mean.view_as(expected), expected, rtol=0, atol=2e-5)


def test_infinities_and_nans(emulated):
    """An infinite pixel matches nothing; a NaN of the bank is in every normaliser of a window that may match it."""
    bank = bank_of(torch.float32, 3, 1, 6, 6)
    bank[1, 0, 2, 2] = float("inf")
    queries = queries_of(bank_of(torch.float32, 3, 1, 6, 6), 1, 0.1)
    options = {"patch_size": 3, "k": 2, "sigma": 0.3}
    for border in ("class", "zero"):
        found = emulated.patch_topk(queries, bank, border=border, **options)
        expected = patch_topk(queries.double(), bank, border=border, backend="reference", **options)
        torch.testing.assert_close(found[0], expected.weights, rtol=2e-5, atol=1e-4)
    bank[1] = float("inf")
    assert (emulated.patch_topk(queries, bank, **options)[0][0, 1] == 0).all()
    mean, _ = emulated.patch_mean(queries, bank, patch_size=3, sigma=0.3)
    assert mean.isfinite().all()
    bank[2, 0, 0, 0] = float("nan")
    found = emulated.patch_topk(queries, bank, **options)
    assert found[0].isnan().all()
    poisoned = found[1].view(6, 6).isnan()
    expected = patch_topk(queries.double(), bank, backend="reference", **options).log_normaliser[0]
    assert torch.equal(poisoned, expected.isnan()) and 0 < poisoned.sum() < 36


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_tiny_sigmas_and_distances_beyond_float32(emulated, dtype):
    """Patches as far share equally; what is too far to be written matches nothing, and 0 / 0 says that nothing does."""
    bank = bank_of(dtype, 3, 1, 4, 5)
    query = queries_of(bank, 1, 0.3)
    weights, _, _, _, shares = emulated.patch_topk(
        query, bank, patch_size=3, k=99, sigma=1e-15, scale=0.0, border="zero"
    )
    torch.testing.assert_close(weights, torch.full((1, 3), 20 / 3).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(shares, torch.full((1, 20), 1 / 60).double(), rtol=1e-6, atol=0)
    weights, log_normaliser, _, _, shares = emulated.patch_topk(query + 3e19, bank, patch_size=3, k=2, sigma=1.0)
    assert weights.isnan().all() and shares.isnan().all() and (log_normaliser == -torch.inf).all()
    assert emulated.patch_mean(query + 3e19, bank, patch_size=3, sigma=1.0)[0].isnan().all()
    if dtype == torch.float32:
        bank[1] = 3e19
        found = emulated.patch_topk(query, bank, patch_size=3, k=2, sigma=1.0)
        expected = emulated.patch_topk(query, bank[::2], patch_size=3, k=2, sigma=1.0)
        assert found[0][0, 1] == 0
        torch.testing.assert_close(found[0][:, ::2], expected[0], rtol=1e-6, atol=0)
