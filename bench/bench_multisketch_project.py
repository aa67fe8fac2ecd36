"""multisketch_project [B, P] -> [B, D] beside the dense projection that it stands for, in gradient entries per second."""

import functools

import pytest
import torch

from bench.contenders import Here
from bench.figures import Goal, lead
from pyattr import ops, testing

TABLE, SEED, PROJ_DIM = "multisketch_project", 20, 4096
COLUMNS = {"B=1, P=33.6M": (1, 1 << 25), "B=16, P=8.4M": (16, 1 << 23)}
OURS, DENSE = "pyattr multisketch_project", "pyattr rademacher_project"


@functools.cache
def gradients(column: str) -> torch.Tensor:
    return testing.make_gradients(*COLUMNS[column], seed=7)  # [B, P]


GOALS = [
    Goal(TABLE, f"{column}: at least {times} times the dense projection", lead(OURS, DENSE, column), times)
    for column, times in zip(COLUMNS, (15, 5), strict=True)
]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", (OURS, DENSE))
def test_multisketch_project(row, column, measure):
    x = gradients(column)
    project = ops.multisketch_project if row == OURS else ops.rademacher_project

    def check(answer):
        """Norms are kept: six standard deviations of either projection, sqrt(1 / (2 D)) and the sketch's 1 / 2^10."""
        ratio = answer.double().norm(dim=1) / x.double().norm(dim=1) / PROJ_DIM**0.5
        assert (ratio - 1).abs().max() <= 6 * ((2 * PROJ_DIM) ** -0.5 + 2.0**-10), f"norm ratios {ratio.tolist()}"

    measure(
        Here(lambda: project(x, PROJ_DIM, seed=SEED, backend="cpu")),
        check=check,
        table=TABLE,
        row=row,
        column=column,
        ours=True,
        work=x.numel(),
        unit="gradient entries",
        bytes=4 * (x.numel() + len(x) * PROJ_DIM),
    )
