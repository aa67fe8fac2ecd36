"""conv2d_grad_project beside forming the per-sample gradients, then projecting them, in gradient entries per second.

``python -m bench.bench_conv2d_grad_project ROW COLUMN`` runs one contender once and prints the MiB that it took at most.
"""

import functools
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import layers
from bench.memory import print_peak
from pyattr.ops import conv2d_grad_project

TABLE = "conv2d_grad_project"


@dataclass(frozen=True)
class Setting:
    """A 3 x 3 convolution on square maps."""

    in_channels: int
    out_channels: int
    size: int
    batch: int = 64
    device: str = "cpu"

    @functools.cached_property
    def data(self) -> tuple[torch.Tensor, torch.Tensor]:  # [B, C, H, W], [B, O, H, W]
        generator = torch.Generator().manual_seed(layers.SEED)
        channels = (self.in_channels, self.out_channels)
        return tuple(
            torch.randn(self.batch, c, self.size, self.size, generator=generator).to(self.device) for c in channels
        )

    @property
    def parameters(self) -> int:
        return self.in_channels * self.out_channels * 9

    def layer(self) -> nn.Module:
        return nn.Conv2d(self.in_channels, self.out_channels, 3, padding=1, bias=False)

    def errs(self) -> torch.Tensor:  # [B, O, L]
        return self.data[1].flatten(2)

    def patches(self) -> torch.Tensor:  # [B, C * 9, L]
        return F.unfold(self.data[0], 3, padding=1)

    def project(self, acts, errs, **options) -> torch.Tensor:
        return conv2d_grad_project(acts, errs, layers.PROJ_DIM, 3, padding=1, seed=layers.SEED, **options)


LARGEST = "CelebA U-Net's largest, 1024 to 512, 8 x 8"
SETTINGS = {
    LARGEST: Setting(1024, 512, 8),
    "256 to 256, 16 x 16": Setting(256, 256, 16),
    "128 to 128, 32 x 32": Setting(128, 128, 32),
}
GOALS = layers.goals(TABLE, SETTINGS)


@pytest.mark.parametrize("column", SETTINGS)
@pytest.mark.parametrize("row", layers.ROWS)
def test_conv2d_grad_project(row, column, measure, leave_out):
    layers.measure_layer("bench_conv2d_grad_project", TABLE, SETTINGS[column], row, column, measure, leave_out)


if __name__ == "__main__":
    chosen = SETTINGS[sys.argv[2]]
    assert chosen.data
    layers.warm_up()
    print_peak(lambda: layers.run(chosen, sys.argv[1]))
