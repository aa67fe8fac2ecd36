"""Models, a loss and data of the tests of per-sample gradients."""

import torch
from torch import nn

B = 4  # samples


def squares(module, batch):
    return module(batch).square().flatten(1).sum(1)


def data(*shape):
    return torch.randn(B, *shape, dtype=torch.float64)


class Model(nn.Module):
    """A module whose forward pass is a function of the test."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer.double() if isinstance(layer, nn.Module) else layer)
        self._run = forward

    def forward(self, *args):
        return self._run(self, *args)


def network():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(36, 3)).double()
