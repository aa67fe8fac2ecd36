"""dattri's own use of sjlt, with our SJLTProjection in its place: it makes one, overwrites its buffers, and calls it."""

import sys

import pytest
import torch
from dattri.func.projection import CudaProjector, ProjectionType

from pyattr.compat import sjlt


@pytest.fixture
def projector(monkeypatch):
    """dattri's projector as its constructor leaves it, which refuses the CPU."""
    monkeypatch.setitem(sys.modules, "sjlt", sjlt)

    def make(proj_type, feature_dim, proj_dim):
        made = CudaProjector.__new__(CudaProjector)
        made.feature_dim, made.proj_dim, made.seed, made.grass_multiplier = feature_dim, proj_dim, 3, 4
        made.proj_type, made.device, made.dtype = proj_type, torch.device("cpu"), torch.float32
        made.generator, made.current_ensemble_id = torch.Generator(), -1
        made.sjlt = made.active_indices = None
        return made

    return make


def drawn(seed, width, outputs):
    """The matrix [width, outputs] that dattri draws from a seed."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(outputs, (width, 1), generator=generator)
    signs = torch.randint(0, 2, (width, 1), generator=generator) * 2 - 1
    return torch.zeros(width, outputs).scatter_(1, indices, signs.float())


def test_sjlt_by_dattri(projector):
    made, features = projector(ProjectionType.sjlt, 5000, 64), torch.randn(6, 5000)
    for member in (0, 1, 0):  # the buffers of the one module are overwritten for each member
        torch.testing.assert_close(made.project(features, member), features @ drawn(3 + 100_000 * member, 5000, 64))
    assert isinstance(made.sjlt, sjlt.SJLTProjection)


def test_grass_by_dattri(projector):
    made, features = projector(ProjectionType.grass, 5000, 64), torch.randn(6, 5000)
    projected = made.project(features, 0)
    assert made.active_indices.shape == (256,)
    matrix = torch.zeros(256, 64).scatter_(1, made.sjlt.rand_indices, made.sjlt.rand_signs.float())
    torch.testing.assert_close(projected, features[:, made.active_indices] @ matrix)


def test_usage_example(run_example):
    names = run_example(sjlt)
    assert names["y"].shape == (100, 128) and names["x"].shape == (100, 1024)
