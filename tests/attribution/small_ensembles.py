"""Ensembles small enough to be computed once more by hand, for the tests of several files."""

import torch
from torch import nn

from pyattr.attribution import EncodedEnsemble
from pyattr.diffusion import Schedule

SCHEDULE = Schedule(6, 1e-2, 0.5)
IMAGES = torch.randint(0, 256, (10, 1, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


class Net(nn.Module):
    """Smooth, in float64, and different from seed to seed."""

    def __init__(self, width=3):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.last = nn.Conv2d(width, 1, 3, padding=1)
        self.double()

    def forward(self, images, timesteps):
        time = self.time(timesteps[:, None].to(images.dtype) / 10)[:, :, None, None]
        return self.last(torch.tanh(self.first(images) + time)) + 0.3 * images


class Scaled(nn.Module):
    """Predicts ``a x + b``."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn((), dtype=torch.float64))
        self.b = nn.Parameter(torch.randn((), dtype=torch.float64))

    def forward(self, images, timesteps):
        return self.a * images + self.b


def ensemble(model=Net, members=4, items=6, **options):
    options = {"steps": 1, "schedule": SCHEDULE, **options}
    return EncodedEnsemble(model, num_members=members, **options).fit(IMAGES[:items])
