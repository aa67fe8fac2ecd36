"""gaussian_project [B, P] -> [B, D] beside its peers, in multiply-adds per second: B * P * D of them in a call."""

import pytest

from bench import projection

CASES = projection.cases("gaussian", small=128)


@pytest.mark.parametrize("batch", projection.BATCHES, ids=lambda batch: f"B{batch}")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
def test_gaussian_project(case, batch, measure, leave_out, peer_python):
    projection.run("gaussian", case, batch, measure, leave_out, peer_python)
