import itertools

import pytest
import torch
from torch import nn

from pyattr.diffusion import Schedule, noise
from pyattr.ops import sign_matrix


class LinearNet(nn.Module):
    """Predicts ``W x``: the gradient of any loss with respect to W can be written down."""

    def __init__(self, size, seed=0):
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False)
        generator = torch.Generator().manual_seed(seed)
        self.layer.weight.data = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5

    def forward(self, images, timesteps):
        return self.layer(images.flatten(1)).view_as(images)


def projected_gradients(
    model, images, ids, *, times, squared=False, noises=1, dim=16, seed=5, noise_seed=2, normalize=False
):
    """Features of a LinearNet on uint8 images, or on images for each timestep, in float64 and written down.

    W x_t predicts eps: d mean (W x_t - eps)^2 = 2 (W x_t - eps) x_t^T / D, and without eps for the squared norm.
    """
    weight, schedule = model.layer.weight.detach(), Schedule()
    signs = sign_matrix(range(dim), range(weight.numel()), seed).double()
    rows = []
    for image, i in zip(images, ids, strict=True):
        total = torch.zeros_like(weight)
        for (number, t), draw in itertools.product(enumerate(times), range(noises)):
            pixels = image.double() / 127.5 - 1 if image.dtype == torch.uint8 else image[number].double()
            eps = noise((pixels.numel(),), seed=noise_seed, ids=int(i), timesteps=t, draws=draw).double()
            abar = schedule.alphas_cumprod[t]
            x = abar.sqrt() * pixels.flatten() + (1 - abar).sqrt() * eps
            error = weight @ x - (0 if squared else eps)
            gradient = 2 * torch.outer(error, x) / len(x)
            total += gradient / (gradient.norm() if normalize else 1) / len(times) / noises
        rows.append(signs @ total.flatten())
    return torch.stack(rows)


@pytest.fixture
def explicit_features():
    return projected_gradients


@pytest.fixture
def linear_net():
    return LinearNet


@pytest.fixture
def schedule():
    return Schedule()


@pytest.fixture
def images():
    return torch.randint(0, 256, (9, 1, 2, 2), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
