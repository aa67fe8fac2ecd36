import pytest
import torch
from torch import nn

from pyattr.diffusion import Schedule


class LinearNet(nn.Module):
    """Predicts ``W x``: the gradient of any loss with respect to W can be written down."""

    def __init__(self, size, seed=0):
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False)
        generator = torch.Generator().manual_seed(seed)
        self.layer.weight.data = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5

    def forward(self, images, timesteps):
        return self.layer(images.flatten(1)).view_as(images)


@pytest.fixture
def linear_net():
    return LinearNet


@pytest.fixture
def schedule():
    return Schedule()


@pytest.fixture
def images():
    return torch.randint(0, 256, (9, 1, 2, 2), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
