"""rademacher_project [B, P] -> [B, D] beside its peers, in sign-adds per second: B * P * D of them in a call."""

import pytest

from bench import projection
from bench.figures import Goal, lead

CASES = projection.cases("rademacher", small=projection.PROJ_DIM)
TABLE = "rademacher_project"


OURS = [f"pyattr cpu {level}" for level in ("avx512", "avx2", "scalar")]


def fastest(rate, column):
    return max((found for row in OURS if (found := rate(row, column))), default=None)


def one_sample(rate):
    alone, many = fastest(rate, "B=1"), fastest(rate, "B=64")
    return alone / many if alone and many else None


GOALS = [
    Goal(
        TABLE,
        "B=16: at least 4 times torch.matmul on a matrix already in memory",
        lead(OURS, "torch.matmul, matrix in memory", "B=16"),
        4,
    ),
    Goal(
        TABLE,
        "B=16: at least 100 times TRAK's BasicProjector",
        lead(OURS, "trak BasicProjector", "B=16"),
        100,
    ),
    Goal(TABLE, "B=64: at least 180e9 sign-adds per second", lambda rate: fastest(rate, "B=64"), 180e9),
    Goal(TABLE, "B=1: per sample at least an eighth as fast as B=64", one_sample, 1 / 8),
    Goal(
        TABLE,
        "B=16: AVX2 at least 40% as fast as AVX-512",
        lead("pyattr cpu avx2", "pyattr cpu avx512", "B=16"),
        0.4,
        missing="this machine has no AVX-512",
    ),
]


@pytest.mark.parametrize("batch", projection.BATCHES, ids=lambda batch: f"B{batch}")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
def test_rademacher_project(case, batch, measure, leave_out, peer_python):
    projection.run("rademacher", case, batch, measure, leave_out, peer_python)
