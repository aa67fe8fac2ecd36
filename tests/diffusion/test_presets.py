import sys

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from pyattr.diffusion import unet


@pytest.mark.parametrize(
    ("name", "parameters", "dropouts", "heads", "attentions"),
    # Two down, three up, one in the middle.
    [("cifar", 38_307_203, 22, {1}, 6), ("celeba", 118_795_011, 32, {64}, 6)],
)
def test_benchmark_networks(name, parameters, dropouts, heads, attentions):
    with torch.device("meta"):
        model = unet(name, dropout=0.1)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, nn.Dropout) and m.p == 0.1 for m in model.modules()) == dropouts
    assert sum(isinstance(m, ResnetBlock2D) for m in model.modules()) == dropouts
    found = [m for m in model.modules() if isinstance(m, Attention)]
    assert len(found) == attentions
    assert {m.heads for m in found} == heads
    assert all(m.group_norm is not None for m in found)


def test_small_network_is_small_and_fits_its_digits():
    model = unet("mnist-small")
    assert 500_000 < sum(p.numel() for p in model.parameters()) < 1_500_000
    assert model.config["in_channels"] == 1 and model.config["sample_size"] == 28
    out = model(torch.randn(2, 1, 28, 28), torch.tensor([0, 999]))
    assert out.shape == (2, 1, 28, 28) and torch.isfinite(out).all()


def test_patches_come_back_where_they_were():
    """With the inner network replaced by one that keeps a single one of its channels, one pixel of each square is left."""

    class OneChannel(nn.Module):
        def forward(self, patches, timesteps):
            kept = torch.zeros_like(patches)
            kept[:, 5] = patches[:, 5]  # the second colour's upper right pixel
            return type("Output", (), {"sample": kept})

    model = unet("mnist-small", channels=2, size=8)
    model.unet = OneChannel()
    images = torch.randn(3, 2, 8, 8)
    expected = torch.zeros_like(images)
    expected[:, 1, 0::2, 1::2] = images[:, 1, 0::2, 1::2]
    assert torch.equal(model(images, torch.zeros(3)), expected)


def test_other_images():
    model = unet("mnist-small", channels=3, size=32)
    assert model(torch.randn(1, 3, 32, 32), torch.tensor([5])).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("imagenet", {}, "name must be one of cifar, celeba, mnist-small"),
        ("mnist-small", {"size": 30}, "multiple of 4, got 1 channels of size 30"),
        ("celeba", {"size": 48}, "multiple of 32"),
        ("cifar", {"channels": -1}, "at least one channel"),
    ],
)
def test_errors(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        unet(name, **arguments)


def test_missing_diffusers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"install pyattr\[models\]"):
        unet("cifar")
