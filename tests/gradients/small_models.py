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


class Network(nn.Module):
    """Every kind of rule, a tied weight, a layer that runs twice, a parameter without a rule, frozen and unused ones."""

    def __init__(self, scaled=True):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5)) if scaled else None
        self.embed = nn.Embedding(9, 5)
        self.conv = nn.Conv1d(5, 8, 3, padding=1, groups=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding="same", groups=2)
        self.up = nn.ConvTranspose1d(8, 8, 2, stride=2)
        self.norm = nn.GroupNorm(2, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.twice = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.twice.weight
        self.unused = nn.Linear(3, 2)
        self.last = nn.LayerNorm(8)

    def forward(self, ids, noise):
        h = self.embed(ids) + noise
        h = h * self.scale if self.scale is not None else h
        h = self.up(self.grouped(torch.tanh(self.conv(h.transpose(1, 2)))))
        h = self.frozen(self.norm(h).transpose(1, 2))
        return self.last(self.tied(torch.sigmoid(self.twice(torch.tanh(self.twice(h))))))


def loss(module, batch):
    return module(batch["ids"], batch["noise"]).pow(3).flatten(1).mean(1)


def over_time(module, batch):
    """[B, T]"""
    return torch.stack([t * loss(module, batch) for t in range(1, 4)], 1)


def make_batch(dtype=torch.float64, size=6):
    return {"ids": torch.randint(0, 9, (size, 7)), "noise": torch.randn(size, 7, 5, dtype=dtype)}


def flat(grads):
    return torch.cat([grad.flatten(1) for grad in grads.values()], 1)


class Images(nn.Module):
    """Convolutions of many settings, a tied one, a linear layer with several rows per sample, norms, in float32."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.strided = nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
        self.same = nn.Conv2d(12, 12, 4, padding="same", padding_mode="reflect", bias=False)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x)))
        x = self.same(torch.tanh(self.same(self.strided(x))))
        return self.head(self.up(x).flatten(2).mT)
