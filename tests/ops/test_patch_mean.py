"""patch_mean: hand-worked cases, an independent brute force, limits, and the properties it promises."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattr import testing
from pyattr.ops import patch_mean, patch_topk

BACKENDS = testing.usable_backends("patch_mean")
FAST = [name for name in BACKENDS if name != "reference"]
CPU = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")


def brute_force(query, bank, patch_size, sigma, scale, border):
    """mean [C, H', W'] and log_normaliser [H', W'] by loops."""
    pad, half = (0 if border == "inside" else (patch_size - 1) // 2), (patch_size - 1) // 2

    def cut(image):
        channels, height, width = image.shape
        padded = np.zeros((channels, height + 2 * pad, width + 2 * pad))
        padded[:, pad : pad + height, pad : pad + width] = image
        inside = np.pad(np.ones((height, width)), pad)
        return {
            (r, c): (
                padded[:, r : r + patch_size, c : c + patch_size],
                inside[r : r + patch_size, c : c + patch_size],
                padded[:, r + half, c + half],
            )
            for r in range(height + 2 * pad - patch_size + 1)
            for c in range(width + 2 * pad - patch_size + 1)
        }

    values = (2 * bank.double() - 255) / 255 if bank.dtype == torch.uint8 else bank.double()
    candidates = [entry for image in values for entry in cut(image.numpy()).values()]
    mine = cut(query.double().numpy())
    size = [1 + max(u[axis] for u in mine) for axis in (0, 1)]
    mean, normaliser = np.zeros((len(query), *size)), np.zeros(size)
    for u, (x, inside, _) in mine.items():
        pairs = [
            (-((x - scale * y) ** 2).sum() / (2 * sigma**2), centre)
            for y, other, centre in candidates
            if border != "class" or (inside == other).all()
        ]
        highest = max(exponent for exponent, _ in pairs)
        total = math.fsum(math.exp(exponent - highest) for exponent, _ in pairs)
        normaliser[u] = highest + math.log(total)
        mean[(slice(None), *u)] = sum(math.exp(exponent - highest) / total * centre for exponent, centre in pairs)
    return mean, normaliser


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """One query pixel at 1 against pixels 0 and 2 at 1 / (2 sigma^2) = 1 with scale 1/2: distances 1 and 0."""
    device = testing.device_of(backend)
    query = torch.tensor([[[[1.0]]]], device=device)
    bank = torch.tensor([[[[0.0]]], [[[2.0]]]], device=device)
    found = patch_mean(query, bank, patch_size=1, sigma=0.5**0.5, scale=0.5, backend=backend)
    total = 1 + math.exp(-1)
    assert found.mean.item() == pytest.approx(2 / total, rel=1e-6)
    assert found.log_normaliser.item() == pytest.approx(math.log(total), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", ["class", "zero", "inside"])
@pytest.mark.parametrize("patch_size", [1, 2, 3, 4])
def test_against_brute_force(backend, border, patch_size):
    device = testing.device_of(backend)
    query, bank = torch.randn(2, 6, 5), torch.randn(9, 2, 6, 5)
    if border == "inside":
        bank = torch.randn(9, 2, 4, 7)
    for sigma in (0.3, 1.5):
        mean, normaliser = brute_force(query, bank, patch_size, sigma, 0.7, border)
        found = patch_mean(
            query[None].to(device), bank.to(device), patch_size=patch_size, sigma=sigma, scale=0.7, border=border,
            backend=backend,
        )  # fmt: skip
        assert found.mean.dtype == torch.float32 and found.log_normaliser.dtype == torch.float64
        np.testing.assert_allclose(found.mean[0].cpu(), mean, rtol=0, atol=3e-5)
        np.testing.assert_allclose(found.log_normaliser[0].cpu(), normaliser, rtol=5e-7, atol=2e-6)


@pytest.mark.parametrize("backend", FAST)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    other=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.integers(1, 4),
    images=st.integers(1, 19),
    patch_size=st.integers(1, 11),
    border=st.sampled_from(["class", "zero", "inside"]),
    sigma=st.floats(0.1, 3.0),
)
def test_any_shape_against_the_reference(backend, size, other, channels, images, patch_size, border, sigma):
    device = testing.device_of(backend)
    if border == "inside":
        patch_size = min(patch_size, *size, *other)
    elif patch_size % 2 == 0 and min(size) == 1:
        patch_size += 1
    queries = torch.randn(2, channels, *size, device=device)
    bank = torch.randint(0, 256, (images, channels, *(other if border == "inside" else size)), dtype=torch.uint8)
    options = dict(patch_size=patch_size, sigma=sigma, scale=0.8, border=border)
    found = patch_mean(queries, bank.to(device), backend=backend, **options)
    exact = patch_mean(queries.double(), bank.to(device), backend="reference", **options)
    torch.testing.assert_close(found.mean.double(), exact.mean, rtol=0, atol=5e-5)
    torch.testing.assert_close(found.log_normaliser.double(), exact.log_normaliser, rtol=5e-7, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits(backend):
    """No noise: the nearest patch's centre. Much: the mean of all that may match."""
    device = testing.device_of(backend)
    bank = torch.randn(7, 2, 8, 8, device=device)
    near = patch_mean(0.5 * bank[3:4], bank, patch_size=3, sigma=1e-3, scale=0.5, backend=backend).mean
    torch.testing.assert_close(near, bank[3:4], rtol=0, atol=1e-6)
    far = patch_mean(bank[3:4], bank, patch_size=3, sigma=1e6, border="zero", backend=backend).mean
    expected = bank.double().mean((0, 2, 3)).float().view(1, 2, 1, 1).expand_as(far)
    torch.testing.assert_close(far, expected, rtol=0, atol=1e-5)
    far = patch_mean(bank[3:4], bank, patch_size=3, sigma=1e6, backend=backend).mean
    torch.testing.assert_close(far[0, :, 0, 0], bank[:, :, 0, 0].mean(0), rtol=0, atol=1e-5)  # a corner: corners alone
    torch.testing.assert_close(far[0, :, 0, 4], bank[:, :, 0, 1:7].mean((0, 2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(far[0, :, 3, 4], bank[:, :, 1:7, 1:7].mean((0, 2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", ["class", "zero"])
def test_the_normaliser_is_that_of_patch_topk(backend, border):
    device = testing.device_of(backend)
    queries, bank = torch.randn(2, 1, 7, 9, device=device), torch.randn(11, 1, 7, 9, device=device)
    options = dict(patch_size=4, sigma=0.6, scale=0.9, border=border, backend=backend)
    mean, topk = patch_mean(queries, bank, **options), patch_topk(queries, bank, k=1, **options)
    torch.testing.assert_close(mean.log_normaliser, topk.log_normaliser, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_bits_do_not_depend_on_chunks_queries_or_run(backend):
    device = testing.device_of(backend)
    queries, bank = torch.randn(3, 2, 8, 8, device=device), torch.randn(37, 2, 8, 8, device=device)
    options = dict(patch_size=3, sigma=[0.3, 0.5, 1.0], backend=backend)
    whole = patch_mean(queries, bank, **options)
    for sizes in ((37,), (1, 36), (8, 9, 0, 20)):
        found = patch_mean(queries, list(bank.split(sizes)), **options)
        if backend == "cpu":
            assert torch.equal(found.mean, whole.mean) and torch.equal(found.log_normaliser, whole.log_normaliser)
        torch.testing.assert_close(found.mean, whole.mean, rtol=0, atol=1e-6)
    for q, sigma in enumerate(options["sigma"]):
        alone = patch_mean(queries[q : q + 1], bank, **(options | {"sigma": sigma}))
        assert torch.equal(alone.mean[0], whole.mean[q])


@CPU
def test_bits_do_not_depend_on_threads_or_waves(monkeypatch):
    queries, bank = torch.randn(1, 1, 8, 8), torch.randn(70, 1, 8, 8)
    torch.set_num_threads(1)
    one = patch_mean(queries, bank, patch_size=5, sigma=0.5, backend="cpu")
    for threads, wave in ((2, 1024), (3, 16), (8, 1)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(sys.modules["pyattr.ops.patch_mean"], "WAVE", wave)
        again = patch_mean(queries, bank, patch_size=5, sigma=0.5, backend="cpu")
        assert torch.equal(again.mean, one.mean) and torch.equal(again.log_normaliser, one.log_normaliser)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite(backend):
    device = testing.device_of(backend)
    queries, bank = torch.randn(1, 1, 6, 6, device=device), torch.randn(9, 1, 6, 6, device=device)
    whole = patch_mean(queries, bank, patch_size=3, sigma=1.0, backend=backend)
    bank[2, 0, 0, 0] = float("nan")
    found = patch_mean(queries, bank, patch_size=3, sigma=1.0, backend=backend)
    bad = found.log_normaliser[0].isnan()
    assert bad[0, :5].all() and bad[:5, 0].all() and bad[1:5, 1:5].all() and bad.sum() == 25
    assert torch.equal(found.mean[0, 0].isnan(), bad)
    torch.testing.assert_close(found.mean[0, 0][~bad], whole.mean[0, 0][~bad])
    bank[2] = float("inf")
    found = patch_mean(queries, bank, patch_size=3, sigma=1.0, backend=backend)
    without = patch_mean(queries, bank[[0, 1, 3, 4, 5, 6, 7, 8]], patch_size=3, sigma=1.0, backend=backend)
    torch.testing.assert_close(found.mean, without.mean)


def test_empty_numpy_and_float64():
    queries = torch.zeros(2, 1, 4, 5)
    none = patch_mean(queries, queries[:0], patch_size=3, sigma=1.0)
    assert none.mean.isnan().all() and none.mean.shape == (2, 1, 4, 5)
    assert (none.log_normaliser == -float("inf")).all() and none.log_normaliser.shape == (2, 4, 5)
    assert patch_mean(queries[:0], queries, patch_size=3, sigma=1.0).mean.shape == (0, 1, 4, 5)
    found = patch_mean(queries.numpy(), queries.numpy(), patch_size=3, sigma=1.0)
    assert isinstance(found.mean, np.ndarray) and found.mean.dtype == np.float32
    assert patch_mean(queries.double(), queries, patch_size=3, sigma=1.0).mean.dtype == torch.float64


ERRORS = [
    ({"border": "circular"}, "border must be one of class, zero, inside, got 'circular'"),
    ({"border": "inside", "patch_size": 6},
     "queries must be at least 6 x 6 pixels for patch_size=6 and border='inside', got 5 x 5"),
    ({"border": "inside", "bank": torch.zeros(2, 1, 2, 9)},
     "bank must be at least 3 x 3 pixels for patch_size=3 and border='inside', got 2 x 9"),
    ({"border": "inside", "bank": torch.zeros(2, 2, 5, 5)}, "bank must have shape [N, 1, 5, 5], got [N, 2, 5, 5]"),
    ({"bank": torch.zeros(2, 1, 5, 6)}, "bank must have shape [N, 1, 5, 5], got [N, 1, 5, 6]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_errors_name_the_argument(change, message):
    arguments = {"bank": torch.zeros(2, 1, 5, 5), "patch_size": 3, "sigma": 1.0} | change
    with pytest.raises(ValueError) as caught:
        patch_mean(torch.zeros(1, 1, 5, 5), arguments.pop("bank"), **arguments)
    assert str(caught.value) == f"patch_mean: {message}"
