"""The Triton patch kernels without a GPU: compiled for one, and run by Triton's interpreter in a child process."""

from importlib import import_module

import pytest
import torch
from triton_without_gpu import INTERPRETED, compile_for_gpu, interpreted, not_interpreted, run_interpreted

from pyattr.ops import patch_mean, patch_topk


@not_interpreted
def test_under_the_interpreter():
    run_interpreted(__file__)


NEVER_SPECIALISED = ("num_items", "num_tiles", "stats_stride", "first_image", "k")


@not_interpreted
@pytest.mark.parametrize("op", ["patch_topk", "patch_mean"])
@pytest.mark.parametrize("held", [True, False], ids=["in registers", "in scratch memory"])
@pytest.mark.parametrize("ones", [False, True], ids=["ordinary", "specialised to sizes of 1"])
def test_compiles_for_a_gpu(op, held, ones):
    kernel = getattr(import_module(f"pyattr.triton_kernels.{op}"), f"{op}_kernel")
    own = {"HELD": held, "BU": 8, "BV": 1024}
    own |= {"NEAREST": True} if op == "patch_topk" else {}
    types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {"tiles_ptr": "*i32", "nearest_ptr": "*i32", "scale": "fp32", "rate": "fp32"}
    compile_for_gpu(kernel, types, own, NEVER_SPECIALISED if ones else None, num_warps=8)


@pytest.fixture(autouse=True)
def small_numbers(monkeypatch):
    """Tiny problems with several programs and launches; rows of more than 512 windows go to scratch memory."""
    if INTERPRETED:
        from pyattr.triton_kernels import patches

        small = {
            "PLANE_FLOATS": 100,
            "HELD": 512,
            "SCRATCH_BLOCK": 512,
            "SCRATCH_WINDOWS": 256,
            "SCRATCH_FLOATS": 300000,
        }
        for name, value in small.items():
            monkeypatch.setattr(patches, name, value)


def bank_of(dtype, *shape):
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    return pixels if dtype == torch.uint8 else (pixels.double() / 127.5 - 1).to(dtype)


def queries_of(bank, count, sigma, scale=1.0):
    images = bank.double() / 127.5 - 1 if bank.dtype == torch.uint8 else bank.double()
    clean = images[torch.arange(count) % len(images)]
    return (scale * clean + sigma * torch.randn(clean.shape).double()).float()


def compare(queries, bank, **options):
    """Against the definition in float64."""
    found = patch_topk(queries, bank, return_winners=True, backend="triton", **options)
    expected = patch_topk(queries.double(), bank, return_winners=True, backend="reference", **options)
    windows = expected.log_normaliser[0].numel()
    torch.testing.assert_close(found.weights.double(), expected.weights, rtol=2e-5, atol=2e-5 * windows)
    torch.testing.assert_close(found.log_normaliser.double(), expected.log_normaliser, rtol=3e-7, atol=2e-5)
    torch.testing.assert_close(found.winners.weights.double(), expected.winners.weights, rtol=2e-5, atol=2e-5)
    assert torch.equal(found.winners.images, expected.winners.images)
    assert torch.equal(found.winners.positions, expected.winners.positions)
    return found


# (C, H, W, p, lowres, border): one pixel; odd and even; no interior along one axis; a patch larger than the image; block sums;
# rows of distances in scratch memory.
CASES = [
    (1, 1, 1, 1, False, "class"),
    (2, 5, 6, 3, False, "class"),
    (2, 4, 5, 4, False, "zero"),
    (1, 5, 3, 4, False, "class"),
    (1, 2, 3, 7, False, "zero"),
    (1, 4, 5, 4, True, "class"),
    (1, 4, 5, 4, True, "zero"),
    (1, 23, 24, 1, False, "zero"),
]


@interpreted
@pytest.mark.parametrize(("channels", "height", "width", "patch_size", "lowres", "border"), CASES)
def test_values(channels, height, width, patch_size, lowres, border):
    bank = bank_of(torch.uint8, 2, channels, height, width)
    queries = queries_of(bank, 1, 0.4, 0.8)
    compare(queries, bank, patch_size=patch_size, k=3, sigma=0.4, scale=0.8, border=border, lowres=lowres)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_types_layouts_and_chunks(dtype):
    bank = bank_of(dtype, 2, 2, 3, 3)
    queries = queries_of(bank, 1, 0.3)
    options = {"patch_size": 2, "k": 2, "sigma": 0.4}
    expected = compare(queries, bank, **options)
    apart = torch.zeros(2, 3, 6, 4, dtype=dtype)[:, :, ::2, 1:3].permute(0, 3, 1, 2).copy_(bank)
    found = patch_topk(queries, [apart[:1], bank[1:1], bank[1:]], backend="triton", **options)
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.log_normaliser, expected.log_normaliser)


@interpreted
@pytest.mark.parametrize(("k", "sigma"), [(1, 0.3), (5, 0.02), (5, 0.3), (8, 30.0), (24, 0.3), (25, 0.3), (1000, 30.0)])
def test_top_k_of_few_and_of_many_terms(k, sigma):
    bank = bank_of(torch.uint8, 2, 1, 5, 5)
    found = compare(queries_of(bank, 1, min(sigma, 1.0)), bank, patch_size=3, k=k, sigma=sigma, border="zero")
    if k >= 25:
        torch.testing.assert_close(found.weights.sum(1), torch.tensor([25.0]), rtol=1e-6, atol=0)


@interpreted
@pytest.mark.parametrize(("size", "k"), [(5, 1), (5, 4), (6, 40)])
def test_ties_count_as_often_as_they_fit(size, k):
    """Windows of the interior match those of both images, those on an edge the edge's own, a corner's the two corners."""
    bank = torch.full((2, 1, size, size), 100, dtype=torch.uint8)
    found = compare(torch.zeros(1, 1, size, size), bank, patch_size=3, k=k, sigma=0.2)
    inner = size - 2
    expected = (min(k, inner**2) + 4 * min(k, inner)) / 2 + 2
    torch.testing.assert_close(found.weights, torch.full((1, 2), float(expected)), rtol=1e-6, atol=0)


@interpreted
@pytest.mark.parametrize(
    ("border", "channels", "height", "width", "patch_size"),
    [("class", 3, 4, 5, 3), ("zero", 1, 3, 4, 2), ("inside", 2, 5, 6, 3), ("zero", 1, 23, 24, 1)],
)
def test_mean(border, channels, height, width, patch_size):
    bank = bank_of(torch.uint8, 2, channels, height, width)
    queries = queries_of(bank, 1, 0.5, 0.8)
    options = {"patch_size": patch_size, "sigma": 0.5, "scale": 0.8, "border": border}
    found = patch_mean(queries, bank, backend="triton", **options)
    expected = patch_mean(queries.double(), bank, backend="reference", **options)
    torch.testing.assert_close(found.mean.double(), expected.mean, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.log_normaliser.double(), expected.log_normaliser, rtol=3e-7, atol=2e-5)


@interpreted
def test_mean_of_windows_wholly_inside_images_of_another_size():
    bank, queries = bank_of(torch.float32, 2, 2, 4, 6), torch.randn(1, 2, 6, 3)
    options = {"patch_size": 3, "sigma": 0.7, "border": "inside"}
    found = patch_mean(queries, bank, backend="triton", **options).mean.double()
    torch.testing.assert_close(
        found, patch_mean(queries.double(), bank, backend="reference", **options).mean, rtol=0, atol=2e-5
    )


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy says so of inf - inf
@pytest.mark.parametrize("border", ["class", "zero"])
def test_infinities_and_nans(border):
    bank = bank_of(torch.float32, 3, 1, 4, 4)
    queries = queries_of(bank, 1, 0.1)
    bank[1, 0, 2, 2] = float("inf")
    options = {"patch_size": 3, "k": 2, "sigma": 0.3, "border": border}
    found = patch_topk(queries, bank, backend="triton", **options)
    expected = patch_topk(queries.double(), bank, backend="reference", **options)
    torch.testing.assert_close(found.weights.double(), expected.weights, rtol=2e-5, atol=1e-4)
    bank[1] = float("inf")
    assert patch_mean(queries, bank, patch_size=3, sigma=0.3, border=border, backend="triton").mean.isfinite().all()
    bank[2, 0, 0, 0] = float("nan")
    found = patch_topk(queries, bank, backend="triton", **options)
    expected = patch_topk(queries.double(), bank, backend="reference", **options)
    assert found.weights.isnan().all()
    assert torch.equal(found.log_normaliser.isnan(), expected.log_normaliser.isnan())


@interpreted
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_tiny_sigmas_and_distances_beyond_float32(dtype):
    bank = bank_of(dtype, 3, 1, 3, 4)
    query = queries_of(bank, 1, 0.3)
    options = {"patch_size": 3, "border": "zero", "backend": "triton"}
    found = patch_topk(query, bank, k=99, sigma=1e-15, scale=0.0, return_winners=True, **options)
    torch.testing.assert_close(found.weights, torch.full((1, 3), 12 / 3), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.winners.weights, torch.full((1, 3, 4), 1 / 36), rtol=1e-6, atol=0)
    found = patch_topk(query + 3e19, bank, k=2, sigma=1.0, return_winners=True, **options)
    assert found.weights.isnan().all() and found.winners.weights.isnan().all()
    assert (found.log_normaliser == -torch.inf).all()
    assert patch_mean(query + 3e19, bank, sigma=1.0, **options).mean.isnan().all()
