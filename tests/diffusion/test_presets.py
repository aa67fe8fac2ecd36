import re
import sys

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from pyattr.attribution import DTRAK
from pyattr.diffusion import Schedule, sample, train, unet


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
    assert sum(p.numel() for p in model.parameters()) == 427_204  # as the documents say
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
    images, t = torch.randn(3, 2, 8, 8), torch.tensor([0, 300, 999])
    abar = Schedule().alphas_cumprod[t].float()[:, None, None, None]
    expected = (1 - abar).sqrt() * images
    expected[:, 1, 0::2, 1::2] += (abar.sqrt() * images)[:, 1, 0::2, 1::2]
    torch.testing.assert_close(model(images, t), expected)


def test_the_schedule_of_a_network_that_has_one_is_its_only_one():
    """It turns its velocity into noise by its own abar: with another's noise in the image, both would be off in silence."""
    own, other = Schedule(100, 1e-3, 0.1), Schedule(100)
    model, images = unet("mnist-small", size=8, schedule=own), torch.zeros(2, 1, 8, 8)
    for name, use in (
        ("sample", lambda schedule: sample(model, schedule, num_images=1, steps=2)),
        ("DTRAK", lambda schedule: DTRAK(model, schedule)),
        ("train", lambda schedule: train(model, images, schedule=schedule, steps=1, batch_size=2)),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: schedule must be the model')}'s own, .*, got "):
            use(other)
        use(Schedule(100, 1e-3, 0.1))


def test_small_network_is_exact_where_its_velocity_is():
    """e = sqrt(1 - abar) x_t + sqrt(abar) v with v = sqrt(abar) eps - sqrt(1 - abar) x gives eps back."""
    schedule = Schedule(100, 1e-3, 0.1)
    x, eps, t = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0, 40, 99])
    abar = schedule.alphas_cumprod[t].float()[:, None, None, None]

    class Velocity(nn.Module):
        def forward(self, patches, timesteps):
            v = abar.sqrt() * eps - (1 - abar).sqrt() * x
            return type("Output", (), {"sample": nn.functional.pixel_unshuffle(v, 2)})

    model = unet("mnist-small", size=8, schedule=schedule)
    model.unet = Velocity()
    torch.testing.assert_close(model(schedule.add_noise(x, eps, t), t), eps, atol=1e-5, rtol=1e-4)


def test_default_device_does_not_stay_with_the_schedule():
    schedule = Schedule()
    with torch.device("meta"):
        unet("mnist-small", schedule=schedule)
    assert schedule.alphas_cumprod.device.type == "cpu"


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
