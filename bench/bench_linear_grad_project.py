"""linear_grad_project beside forming the per-sample gradients, then projecting them, in gradient entries per second.

``python -m bench.bench_linear_grad_project ROW COLUMN`` runs one contender once and prints the MiB that it took at most.
"""

import functools
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from bench import layers
from bench.memory import print_peak
from pyattr.ops import linear_grad_project

TABLE = "linear_grad_project"


@dataclass(frozen=True)
class Setting:
    """A linear layer on ``tokens`` positions of each sample."""

    in_features: int
    out_features: int
    tokens: int
    batch: int = 64
    device: str = "cpu"

    @functools.cached_property
    def data(self) -> tuple[torch.Tensor, torch.Tensor]:  # [B, T, I], [B, T, O]
        generator = torch.Generator().manual_seed(layers.SEED)
        widths = (self.in_features, self.out_features)
        return tuple(
            torch.randn(self.batch, self.tokens, width, generator=generator).to(self.device) for width in widths
        )

    @property
    def parameters(self) -> int:
        return self.in_features * self.out_features

    def layer(self) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, bias=False)

    def errs(self) -> torch.Tensor:  # [B, O, T]
        return self.data[1].mT

    def patches(self) -> torch.Tensor:  # [B, I, T]
        return self.data[0].mT

    def project(self, acts, errs, **options) -> torch.Tensor:
        return linear_grad_project(acts, errs, layers.PROJ_DIM, seed=layers.SEED, **options)


SETTINGS = {
    "time embedding, 512 to 512": Setting(512, 512, 1),
    "attention, 512 to 512, 64 tokens": Setting(512, 512, 64),
    "1280 to 1280, 256 tokens, B=16": Setting(1280, 1280, 256, batch=16),
}
GOALS = layers.goals(TABLE, SETTINGS)


@pytest.mark.parametrize("column", SETTINGS)
@pytest.mark.parametrize("row", layers.ROWS)
def test_linear_grad_project(row, column, measure, leave_out):
    layers.measure_layer("bench_linear_grad_project", TABLE, SETTINGS[column], row, column, measure, leave_out)


if __name__ == "__main__":
    chosen = SETTINGS[sys.argv[2]]
    assert chosen.data
    layers.warm_up()
    print_peak(lambda: layers.run(chosen, sys.argv[1]))
