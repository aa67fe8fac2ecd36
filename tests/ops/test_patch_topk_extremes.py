"""patch_topk and patch_mean where numbers run out: tiny sigmas, huge pixels, and the reference's blocks."""

import pytest
import torch
from patch_images import noisy, pixels

from pyattr import testing
from pyattr.ops import patch_mean, patch_topk
from pyattr.reference import patches

BACKENDS = testing.usable_backends("patch_topk")
FAST = [name for name in BACKENDS if name != "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sigma", [1e-15, 1e-8, 1e-3])
def test_patches_as_far_share_equally_however_small_sigma_is(backend, sigma):
    """With scale 0 all patches are equally far: the exponents are some 1e16 to 1e30, their differences 0."""
    device = testing.device_of(backend)
    query, bank = torch.randn(1, 1, 5, 6, device=device), torch.randn(4, 1, 5, 6, device=device)
    options = {"patch_size": 3, "sigma": sigma, "scale": 0.0, "backend": backend}
    found = patch_topk(query, bank, k=7, border="zero", return_winners=True, **options)
    # Each of 30 positions gives each of 120 patches the same weight, 7 of which count for an image.
    torch.testing.assert_close(found.weights.cpu(), torch.full((1, 4), 30 * 7 / 120), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.winners.weights.cpu(), torch.full((1, 5, 6), 1 / 120), rtol=1e-5, atol=0)
    found = patch_topk(query, bank, k=99, return_winners=True, **options)
    torch.testing.assert_close(found.weights.cpu(), torch.full((1, 4), 30 / 4), rtol=1e-5, atol=0)
    expected = torch.full((5, 6), 1 / 4)  # corners match one place of each image, edges 4 or 3, the interior 12
    expected[0, 1:5], expected[4, 1:5], expected[1:4, 0], expected[1:4, 5], expected[1:4, 1:5] = (
        1 / 16, 1 / 16, 1 / 12, 1 / 12, 1 / 48,
    )  # fmt: skip
    torch.testing.assert_close(found.winners.weights[0].cpu(), expected, rtol=1e-5, atol=0)
    mean = patch_mean(query, bank, border="inside", **options).mean
    centres = bank[:, 0, 1:-1, 1:-1].double().mean().float()
    torch.testing.assert_close(mean, centres.expand(1, 1, 3, 4), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_nearest_patch_and_its_twin_at_a_tiny_sigma(backend):
    """Exponents of 1 and 4 times 5e15: the nearest two share everything."""
    device = testing.device_of(backend)
    query = torch.ones(1, 1, 1, 1, device=device)
    bank = torch.tensor([-1.0, 0.0, 3.0, 0.0], device=device).view(4, 1, 1, 1)
    found = patch_topk(query, bank, patch_size=1, k=1, sigma=1e-8, return_winners=True, backend=backend)
    assert found.weights.tolist() == [[0, 0.5, 0, 0.5]]
    assert found.winners.images.item() == 1 and found.winners.weights.item() == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", ["class", "zero"])
def test_distances_beyond_float32_are_infinite_to_compiled_backends(backend, border):
    """What lies so far matches nothing, by its weight or by saying NaN; no other patch is touched."""
    device = testing.device_of(backend)
    query, bank = torch.randn(1, 2, 5, 6, device=device), torch.randn(4, 2, 5, 6, device=device)
    options = {"patch_size": 3, "sigma": 1.0, "border": border, "backend": backend}
    others = bank[[0, 1, 3]]
    bank[2] = 3e19
    found, without = (patch_topk(query, b, k=2, return_winners=True, **options) for b in (bank, others))
    assert found.weights[0, 2] == 0
    torch.testing.assert_close(found.weights[:, [0, 1, 3]], without.weights)
    torch.testing.assert_close(found.log_normaliser, without.log_normaliser)
    torch.testing.assert_close(patch_mean(query, bank, **options).mean, patch_mean(query, others, **options).mean)
    alone = patch_topk(query, bank[2:3], k=2, return_winners=True, **options)
    mean = patch_mean(query, bank[2:3], **options).mean
    if backend == "reference":
        assert alone.weights.isfinite().all() and mean.isfinite().all()
    else:
        assert alone.weights.isnan().all() and alone.winners.weights.isnan().all() and mean.isnan().all()
        assert (alone.log_normaliser == -torch.inf).all()


@pytest.mark.parametrize("border", ["class", "zero"])
def test_the_reference_in_blocks_of_any_size(border, monkeypatch):
    """More images than it takes at a time, in chunks of several sizes, and some positions at a time."""
    bank = pixels(11, 1, 6, 5)
    query = noisy(bank, 0.9, 0.4).double()
    options = {"patch_size": 3, "sigma": 0.4, "scale": 0.9, "border": border, "backend": "reference"}

    def everything(bank):
        found = patch_topk(query, bank, k=2, return_winners=True, **options)
        return [*found[:2], *found.winners, *patch_mean(query, bank, **options)]

    whole = everything(bank)
    for images, positions in ((64, 7), (4, 7), (4, 1), (3, 30)):
        monkeypatch.setattr(patches, "IMAGES", images)
        monkeypatch.setattr(patches, "BLOCK", positions * images * 30)
        for given in (bank, list(bank.split((2, 0, 8, 1)))):
            for found, expected in zip(everything(given), whole, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
